// What FP8 needs of AVX-512 beyond vec_avx512.h.
#pragma once

#include "cpu/simd/vec_avx512.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
inline I or_i(I a, I b) { return _mm512_or_si512(a, b); }
inline I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) { return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(a, b), no, yes); }
inline I truncated(F v) { return _mm512_cvttps_epi32(v); }

// The low byte of every lane.
inline void store_u8(uint8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
inline F load_e4m3_256th(const uint8_t* p) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF))));
}
inline I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

// Lane i is the largest lane of v[i]: pairs of vectors fold into one, their lanes side by side.
inline I max_of_each(const I* v) {
  I pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {
    const I a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const I a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  // 128-bit lanes: of two vectors, then of four.
  const I low =
      _mm512_max_epi32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x44), _mm512_shuffle_i32x4(fours[0], fours[1], 0xEE));
  const I high =
      _mm512_max_epi32(_mm512_shuffle_i32x4(fours[2], fours[3], 0x44), _mm512_shuffle_i32x4(fours[2], fours[3], 0xEE));
  return _mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
