// What FP8 needs of AVX2 beyond vec_avx2.h.
#pragma once

#include "cpu/simd/vec_avx2.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
inline I or_i(I a, I b) { return _mm256_or_si256(a, b); }
inline I min_i(I a, I b) { return _mm256_min_epi32(a, b); }
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a)); }
inline I truncated(F v) { return _mm256_cvttps_epi32(v); }

// The low byte of every lane.
inline void store_u8(uint8_t* p, I v) {
  const I first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1,
                                   -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const I bytes = _mm256_shuffle_epi8(v, first);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
inline F load_e4m3_256th(const uint8_t* p) {
  const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(static_cast<int16_t>(0xBFFF))));
}
inline I load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Lane i is the largest lane of v[i]: pairs of vectors fold into one, their lanes side by side.
inline I max_of_each(const I* v) {
  I pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const I a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const I a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  return _mm256_max_epi32(_mm256_permute2x128_si256(fours[0], fours[1], 0x20),
                          _mm256_permute2x128_si256(fours[0], fours[1], 0x31));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
