// 8-bit integers with bf16 activations, GEMV. A code u stands for u + table[0], which is split into two numbers that
// are exact in bf16 and cost little to make, so that a pair of weights takes 2 vdpbf16ps and 2 or 3 cheap instructions,
// not a look-up among 256 entries (4 vpermi2b and 2 blends for each of two bytes).
#pragma once

#include "cpu/weights/bf16-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

struct WordPair {
  __m512i a, b;
};

// u - 128 = (128 + (u & 127)) + (u & 128 ? -128 : -256). The low 7 bits of u are the mantissa of the first, and its
// high bit lies where the exponents of -128 and -256 differ.
struct WordSigned {
  static constexpr int kBits = 8;
  __m512i mantissa = _mm512_set1_epi16(0x007F), from_128 = _mm512_set1_epi16(0x4300);
  __m512i exponent = _mm512_set1_epi16(0x0080), minus_256 = _mm512_set1_epi16(static_cast<int16_t>(0xC380));
  explicit WordSigned(const Launch&) {}
  static std::nullptr_t at(int64_t, int64_t, int) { return nullptr; }
  LOWBIT_INLINE WordPair operator()(__m512i code) const {
    return {_mm512_ternarylogic_epi32(code, mantissa, from_128, 0xEA),    // code & mantissa | from_128
            _mm512_ternarylogic_epi32(code, exponent, minus_256, 0x6A)};  // code & exponent ^ minus_256
  }
};

// Any other table[0]: an entry for the low 5 bits and one for the high 3. vpermw ignores the bits above the fifth, and
// the table of the high bits repeats every 8 entries.
struct WordShifted {
  static constexpr int kBits = 8;
  __m512i low, high;
  explicit WordShifted(const Launch& l) {
    const int first = static_cast<int>(l.table[0]), rest = first & 31;
    alignas(64) float lows[32], highs[32];
    for (int i = 0; i < 32; ++i) {
      lows[i] = static_cast<float>(i + rest);
      highs[i] = static_cast<float>(32 * (i & 7) + first - rest);
    }
    low = words(lows);
    high = words(highs);
  }
  static std::nullptr_t at(int64_t, int64_t, int) { return nullptr; }
  static __m512i words(const float* values) {
    alignas(64) uint16_t w[32];
    store_bf16(w, load(values));
    store_bf16(w + 16, load(values + 16));
    return load_i(w);
  }
  LOWBIT_INLINE WordPair operator()(__m512i code) const {
    return {_mm512_permutexvar_epi16(code, low), _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 5), high)};
  }
};

template <class Words>
struct ComputeInt8Bf16 : ComputeBf16<8> {
  using Codec = Words;
  template <int S>
  LOWBIT_INLINE static WordPair value(const Words& words, const uint8_t* block, std::nullptr_t) {
    const __m512i code = load_i(block + S / 2 * kUnitBytes);
    return words(S % 2 ? _mm512_srli_epi16(code, 8) : code);
  }
  LOWBIT_INLINE static F dot(F acc, __m512i x, WordPair value) {
    return ComputeBf16<8>::dot(ComputeBf16<8>::dot(acc, x, value.b), x, value.a);
  }
};

void gemv_int8_run(const Launch& l, int64_t begin, int64_t end) {
  if (l.table[0] == -128.0f) {
    gemv_run<ComputeInt8Bf16<WordSigned>>(l, begin, end);
  } else {
    gemv_run<ComputeInt8Bf16<WordShifted>>(l, begin, end);
  }
}

constexpr Kernel gemv_bf16_int8(const char* name) {
  Kernel kernel = gemv_bf16<8>(name);
  kernel.codec = Codec::kInt;
  kernel.run = gemv_int8_run;
  return kernel;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
