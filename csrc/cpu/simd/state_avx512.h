// What FP8 states need beside the vectors of AVX-512. vdivps and vsqrtps of 16 lanes: one in 10 and 15 cycles on Zen 4.
#pragma once

#include "cpu/simd/fp8_avx512.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline F root(F v) { return _mm512_sqrt_ps(v); }
inline I min_u(I a, I b) { return _mm512_min_epu32(a, b); }
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), other, v);
}
inline F floor_of(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// To nearest even.
inline I nearest(F v) { return _mm512_cvtps_epi32(v); }
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F shrink(F v, F n) { return _mm512_scalef_ps(v, n); }
inline uint32_t highest(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
inline uint32_t lowest(I v) { return _mm512_reduce_min_epu32(v); }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
