// Bytes in vectors of AVX-512 with VNNI and VBMI. vpdpbusd: latency 4, one a cycle on Zen 4, two on Zen 5 and Sapphire
// Rapids; vpermb and vpmultishiftqb one a cycle.
#pragma once

// clang-format off: the vectors come first
#include "cpu/simd/vec_avx512.h"
#include "cpu/weights/codecs-inl.h"
// clang-format on

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kGemmRows = 6;  // 6 x 4 sums, 4 vectors of weights and a broadcast fill the 32 registers
constexpr int kGemmVecs = 4;
constexpr int kSkinnyRows = 8;  // rows of x that share a decoded vector: 8 x 2 sums
constexpr int kSkinnyVecs = 2;

// Every lane of acc + the four products of unsigned bytes of w and signed bytes of x.
template <bool kWide>
LOWBIT_INLINE inline I dot4(I acc, I w, I x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}
inline I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I set1_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
inline I load_i8_lanes(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }

// Brings bit `first` of each word to bit P of its low byte, and bit `second` to bit P of its high byte.
template <int P>
LOWBIT_INLINE inline I gather_bits(I v, int first, int second, int) {
  const auto control = [&](int half) {
    uint64_t c = 0;
    for (int i = 0; i < 4; ++i) {
      c |= static_cast<uint64_t>((64 + 32 * half + 16 * (i / 2) + (i % 2 ? second : first) - P) % 64) << (8 * i);
    }
    return c;
  };
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(control(0) | control(1) << 32)), v);
}

// Looks up the low B bits of each byte; higher bits are ignored.
template <int B>
struct ByteTable {
  static constexpr int kVecs = B <= 6 ? 1 : 4;
  I t[kVecs];
  explicit ByteTable(const uint8_t* values) {
    alignas(64) uint8_t bytes[kVecs * 64];
    for (int i = 0; i < kVecs * 64; ++i) bytes[i] = values[i & ((1 << B) - 1)];
    for (int v = 0; v < kVecs; ++v) t[v] = load_i(bytes + v * 64);
  }
  LOWBIT_INLINE I operator()(I code) const {
    if constexpr (kVecs == 1) {
      return _mm512_permutexvar_epi8(code, t[0]);
    } else {
      const I low = _mm512_permutex2var_epi8(t[0], code, t[1]), high = _mm512_permutex2var_epi8(t[2], code, t[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
    }
  }
};

// Reorders the bytes of each chunk in place: byte i takes byte order[i].
inline void permute_chunks(int8_t* row, int64_t bytes, const uint8_t* order) {
  alignas(64) uint8_t index[64];
  for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i / 32 * 32 + order[i % 32]);
  const I index_vector = load_i(index);
  for (int64_t i = 0; i < bytes; i += 64) store_i(row + i, _mm512_permutexvar_epi8(index_vector, load_i(row + i)));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
