// What FP8 states need beside the vectors of AVX2. vdivps and vsqrtps of 8 lanes: one in 5 and 8 cycles on Zen 4.
#pragma once

#include "cpu/simd/fp8_avx2.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline F root(F v) { return _mm256_sqrt_ps(v); }
inline I min_u(I a, I b) { return _mm256_min_epu32(a, b); }
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return _mm256_blendv_ps(other, v, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
}
inline F floor_of(F v) { return _mm256_floor_ps(v); }
// To nearest even.
inline I nearest(F v) { return _mm256_cvtps_epi32(v); }
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F shrink(F v, F n) {
  const I exponent = nearest(_mm256_max_ps(n, set1(-126.0f)));
  return mul(v, as_float(shift_left<23>(add_i(exponent, set1_i(127)))));
}
inline uint32_t highest(I v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1))));
}
inline uint32_t lowest(I v) {
  __m128i m = _mm_min_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_min_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_min_epu32(m, _mm_shuffle_epi32(m, 0xB1))));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
