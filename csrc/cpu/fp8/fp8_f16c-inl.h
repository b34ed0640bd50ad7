// FP8 as fp16, which F16C converts to fp32. An E5M2 is the upper byte of an fp16; an E4M3 has the bits of the fp16 that
// is 2^-8 of it, subnormals included.
#pragma once

#include "cpu/fp8/fp8-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// What words_of divides by.
template <Float8 T>
constexpr float kWordFactor = T == Float8::kE4m3 ? 0x1p8f : 1.0f;

// Codes in the upper bytes of words whose lower bytes are zero, as fp16.
template <Float8 T>
LOWBIT_INLINE inline I words_of(I codes) {
  if constexpr (T == Float8::kE5m2) return codes;
  // The sign is shifted into the top exponent bit as well, and NaN, the largest magnitude, carries into it.
  const I bits = _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
  const I nan = _mm256_and_si256(_mm256_add_epi16(bits, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  return _mm256_or_si256(bits, nan);
}
LOWBIT_INLINE inline F low_halves(I words) { return _mm256_cvtph_ps(_mm256_castsi256_si128(words)); }
LOWBIT_INLINE inline F high_halves(I words) { return _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)); }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
