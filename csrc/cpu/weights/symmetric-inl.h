// Look-ups of 8-bit codes in tables of bf16 with AVX-512 VBMI: the low and the high bytes of an entry apart.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// The low and the high bytes of 64 * vecs entries as bf16, in tables of 64 bytes.
inline void split_bytes(const float* values, int vecs, __m512i* low, __m512i* high) {
  for (int v = 0; v < vecs; ++v) {
    alignas(64) uint16_t words[64];
    for (int i = 0; i < 64; i += 16) store_bf16(words + i, load(values + v * 64 + i));
    alignas(64) uint8_t bytes[2][64];
    for (int i = 0; i < 64; ++i) {
      bytes[0][i] = static_cast<uint8_t>(words[i]);
      bytes[1][i] = static_cast<uint8_t>(words[i] >> 8);
    }
    low[v] = load_i(bytes[0]);
    high[v] = load_i(bytes[1]);
  }
}

// A vector of 8-bit codes holds two vectors of pairs, in the low and the high bytes of its words: the words of pair J
// of what the bytes were looked up to. The compiler looks the codes up once for both.
template <int J>
LOWBIT_INLINE inline __m512i pair_words(__m512i low, __m512i high) {
  const __m512i low_bytes = _mm512_set1_epi16(255);
  return J % 2 == 0 ? select_bits(low_bytes, low, _mm512_slli_epi16(high, 8))
                    : select_bits(low_bytes, _mm512_srli_epi16(low, 8), high);
}

// 256 entries of which the upper half is the lower one negated, as in e4m3 and e5m2: half of the look-ups.
struct SymmetricTable {
  __m512i low[2], high[2];
  explicit SymmetricTable(const float* values) { split_bytes(values, 2, low, high); }
  LOWBIT_INLINE __m512i low_bytes(__m512i code) const { return _mm512_permutex2var_epi8(low[0], code, low[1]); }
  LOWBIT_INLINE __m512i high_bytes(__m512i code) const {
    const __m512i h = _mm512_permutex2var_epi8(high[0], code, high[1]);
    return _mm512_ternarylogic_epi32(h, code, _mm512_set1_epi8(-128), 0xF8);  // h | code & 0x80
  }
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
