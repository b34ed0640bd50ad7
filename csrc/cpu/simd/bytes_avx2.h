// Bytes in vectors of AVX2. vpmaddubsw saturates at 16 bits: two products of 255 and 127 do not fit, so bytes above 127
// are multiplied in two parts. vpmaddubsw, vpmaddwd: latency 3 to 5, two a cycle.
#pragma once

// clang-format off: the vectors come first
#include "cpu/simd/vec_avx2.h"
#include "cpu/weights/codecs-inl.h"
// clang-format on

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kGemmRows = 4;
constexpr int kGemmVecs = 2;
constexpr int kSkinnyRows = 4;
constexpr int kSkinnyVecs = 2;

inline I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I set1_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
inline I load_i8_lanes(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Every lane of acc + the four products of unsigned bytes of w, below 128 unless kWide, and signed bytes of x.
template <bool kWide>
LOWBIT_INLINE inline I dot4(I acc, I w, I x) {
  const I ones = _mm256_set1_epi16(1);
  if constexpr (!kWide) {
    return add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));  // 2 * 127 * 128 < 2^15
  } else {
    // w = low + top with top 0 or 128: 2 * 128 * -128 = -2^15 still fits.
    const I top = bit_and(w, set1_bytes(-128)), low = bit_and(w, set1_bytes(127));
    acc = add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
    return add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), ones));
  }
}

// Brings bits `first` .. `first` + width of each word to bit P of its low byte, and those at `second` to bit P of its
// high byte.
template <int P>
LOWBIT_INLINE inline I gather_bits(I v, int first, int second, int width) {
  const auto shifted = [&](int by) { return by >= 0 ? _mm256_srli_epi16(v, by) : _mm256_slli_epi16(v, -by); };
  const int field = ((1 << width) - 1) << P;
  return _mm256_or_si256(bit_and(shifted(first - P), _mm256_set1_epi16(static_cast<int16_t>(field))),
                         bit_and(shifted(second - 8 - P), _mm256_set1_epi16(static_cast<int16_t>(field << 8))));
}

// Looks up the low B bits of each byte.
template <int B>
struct ByteTable {
  static constexpr int kVecs = B <= 4 ? 1 : 1 << (B - 4);
  I t[kVecs];
  explicit ByteTable(const uint8_t* values) {
    for (int v = 0; v < kVecs; ++v) {
      alignas(32) uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) bytes[i] = values[(v * 16 + i % 16) & ((1 << B) - 1)];
      t[v] = load_i(bytes);
    }
  }
  LOWBIT_INLINE I operator()(I code) const {
    const I index = bit_and(code, set1_bytes(15));
    I r[kVecs];
    for (int v = 0; v < kVecs; ++v) r[v] = _mm256_shuffle_epi8(t[v], index);
    // A blend looks at the top bit of each byte.
    for (int bit = 4, width = kVecs / 2; width > 0; ++bit, width /= 2) {
      const I choose = _mm256_slli_epi16(code, 7 - bit);
      for (int i = 0; i < width; ++i) r[i] = _mm256_blendv_epi8(r[2 * i], r[2 * i + 1], choose);
    }
    return r[0];
  }
};

// Reorders the bytes of each chunk in place: byte i takes byte order[i].
inline void permute_chunks(int8_t* row, int64_t bytes, const uint8_t* order) {
  for (int64_t k = 0; k < bytes; k += kChunkK) {
    int8_t chunk[kChunkK];
    __builtin_memcpy(chunk, row + k, kChunkK);
    for (int i = 0; i < kChunkK; ++i) row[k + i] = chunk[order[i]];
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
