// Counts of bits in vectors of AVX2: a nibble looks its count up with vpshufb (Mula, Kurz, Lemire, arXiv 1611.07612).
// Counts stay in bytes until they might overflow.
#pragma once

// clang-format off: the vectors come first
#include "cpu/simd/vec_avx2.h"
#include "cpu/weights/codecs-inl.h"
// clang-format on

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kSignRows = 4;
constexpr int kSignVecs = 2;
constexpr int64_t kCountChunks = 31;  // 31 * 8 < 256

inline I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
inline I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
// Counts of each byte.
inline I count(I sums, I bits) {
  const I counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const I nibble = _mm256_set1_epi8(15);
  const I low = _mm256_shuffle_epi8(counts, bit_and(bits, nibble));
  const I high = _mm256_shuffle_epi8(counts, bit_and(shift_right<4>(bits), nibble));
  return _mm256_add_epi8(sums, _mm256_add_epi8(low, high));
}
// The sum of the bytes of each dword.
inline I total(I sums) {
  const I pairs = _mm256_maddubs_epi16(sums, _mm256_set1_epi8(1));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_GE_OQ)));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
