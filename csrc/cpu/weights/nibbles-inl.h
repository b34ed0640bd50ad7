// 4-bit GEMV with AVX2: vpshufb looks 32 codes up at a time, one byte of the entries, and unpacking joins the bytes.
// vpermps looks up 8 codes among 8 entries.
// Instructions for 64 weights (32 bytes of codes) and one row of x: 32 for entries that are exact in bf16, 38 for any
// other, against 56 with vpermps.
//
// Byte i of a column's dword holds, for i = 0, 1, 2, 3, weights 0, 4, 1, 5 of 8 in its low half and 2, 6, 3, 7 in its
// high half, so a vector of products belongs to a few columns and has several weights of each.
#pragma once

#include <cstddef>

#include "cpu/weights/bytes_gemv-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kNibbleBits = 4;

// Byte `byte` of each of 16 entries, for both halves of a vector.
inline I byte_plane(const float* table, int byte) {
  alignas(16) uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(bytes + i, reinterpret_cast<const char*>(table + i) + byte, 1);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// The codes of step 0 or 1, of bytes that hold those of both.
template <int kStep>
LOWBIT_INLINE inline I nibbles_of(I bytes) {
  const I mask = _mm256_set1_epi8(15);
  if constexpr (kStep == 0) return bit_and(bytes, mask);
  return bit_and(shift_right<4>(bytes), mask);
}

// Entries with no more than a bf16's bits. Two weights of a column stand in a dword: the first is shifted up.
struct NibbleBf16 {
  static constexpr int kBits = kNibbleBits;
  static constexpr int kSums = 2;
  static constexpr int kRowsOfTwo = 2;  // rows up to which a tile has 16 columns
  I low, high;
  explicit NibbleBf16(const Launch& l) : low(byte_plane(l.table, 2)), high(byte_plane(l.table, 3)) {}
  static std::nullptr_t at(const Launch&, int64_t, int64_t, int) { return nullptr; }
  template <int kHalf, int kRows, int kParts>
  LOWBIT_INLINE void step(I codes, std::nullptr_t, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    const I index = nibbles_of<kHalf>(codes);
    const I l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    unroll<kSums>([&](auto s) LOWBIT_INLINE {
      const I words = s == 0 ? _mm256_unpacklo_epi8(l, h) : _mm256_unpackhi_epi8(l, h);
      const F first = as_float(shift_left<16>(words));
      const F second = as_float(bit_and(words, set1_i(static_cast<int32_t>(0xFFFF0000))));
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const float* at = x[r] + 2 * kHalf;
        acc[0][r][s] = fma(first, broadcast_pair(at), acc[0][r][s]);
        acc[kParts - 1][r][s] = fma(second, broadcast_pair(at + 4), acc[kParts - 1][r][s]);
      });
    });
  }
  static F reduce(const F (&sums)[kSums]) { return _mm256_hadd_ps(sums[0], sums[1]); }
};

// Products with entries whose bytes are looked up apart; x is in the order of the bytes (prepare_nibbles).
constexpr int kNibbleSums = 4;
template <int kHalf, int kRows, int kParts>
LOWBIT_INLINE inline void add_entries(const I (&b)[4], const float* const* x, F (&acc)[kParts][kRows][kNibbleSums]) {
  unroll<2>([&](auto s) LOWBIT_INLINE {
    const I low = s == 0 ? _mm256_unpacklo_epi8(b[0], b[1]) : _mm256_unpackhi_epi8(b[0], b[1]);
    const I high = s == 0 ? _mm256_unpacklo_epi8(b[2], b[3]) : _mm256_unpackhi_epi8(b[2], b[3]);
    const F first = as_float(_mm256_unpacklo_epi16(low, high)), second = as_float(_mm256_unpackhi_epi16(low, high));
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      const F xr = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x[r] + 4 * kHalf));
      acc[0][r][2 * s] = fma(first, xr, acc[0][r][2 * s]);
      acc[0][r][2 * s + 1] = fma(second, xr, acc[0][r][2 * s + 1]);
    });
  });
}

// Any entries.
struct NibbleF32 {
  static constexpr int kBits = kNibbleBits;
  static constexpr int kSums = kNibbleSums;
  static constexpr int kRowsOfTwo = 1;
  I bytes[4];
  explicit NibbleF32(const Launch& l)
      : bytes{byte_plane(l.table, 0), byte_plane(l.table, 1), byte_plane(l.table, 2), byte_plane(l.table, 3)} {}
  static std::nullptr_t at(const Launch&, int64_t, int64_t, int) { return nullptr; }
  template <int kHalf, int kRows, int kParts>
  LOWBIT_INLINE void step(I codes, std::nullptr_t, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    const I index = nibbles_of<kHalf>(codes);
    I b[4];
    unroll<4>([&](auto i) LOWBIT_INLINE { b[i] = _mm256_shuffle_epi8(bytes[i], index); });
    add_entries<kHalf>(b, x, acc);
  }
  static F reduce(const F (&sums)[kSums]) {
    return _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  }
};

// A pair of tables: vpshufb gives 0 where the top bit of an index is set, so each column finds its entries in one of
// the tables and 0 in the other. 58 instructions for 64 weights.
struct NibblePair {
  static constexpr int kBits = kNibbleBits;
  static constexpr int kSums = kNibbleSums;
  static constexpr int kRowsOfTwo = 1;
  NibbleF32 first;
  I second[4];
  explicit NibblePair(const Launch& l) : first(l) {
    for (int i = 0; i < 4; ++i) second[i] = byte_plane(l.table + (1 << kBits), i);
  }
  // The top bit of each byte of columns with the second table.
  LOWBIT_INLINE static I at(const Launch& l, int64_t block, int64_t group, int lane) {
    const I chosen = sub_i(set1_i(0), bit_and(pair_scales(l, block, group, lane), set1_i(1)));
    return bit_and(chosen, set1_bytes(-128));
  }
  template <int kHalf, int kRows, int kParts>
  LOWBIT_INLINE void step(I codes, I chosen, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    const I index = nibbles_of<kHalf>(codes);
    const I of_first = or_i(index, chosen), of_second = or_i(index, xor_i(chosen, set1_bytes(-128)));
    I b[4];
    unroll<4>([&](auto i) LOWBIT_INLINE {
      b[i] = or_i(_mm256_shuffle_epi8(first.bytes[i], of_first), _mm256_shuffle_epi8(second[i], of_second));
    });
    add_entries<kHalf>(b, x, acc);
  }
  static F reduce(const F (&sums)[kSums]) { return NibbleF32::reduce(sums); }
};

// Rows [begin, end) of x as fp32, zero beyond k, each 8 in the order of the bytes.
inline void prepare_nibbles(const Launch& l, int64_t begin, int64_t end) {
  prepare_f32(l, begin, end);
  const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t m = begin; m < end; ++m) {
    float* row = static_cast<float*>(l.prepared) + m * l.prepared_stride;
    for (int64_t i = 0; i < l.prepared_stride; i += 8) store(row + i, _mm256_permutevar8x32_ps(load(row + i), order));
  }
}

constexpr Kernel nibbles(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kF32,
          .codec = Codec::kLut,
          .bits = kNibbleBits,
          .scope = Scope::kShared,
          .isa = LOWBIT_ISA_BIT,
          .chunk_groups = true,
          .exact_x = kFloatInputs,
          .prepare = prepare_nibbles,
          .run = bytes_run<NibbleF32>,
          .half_groups = true};
}
constexpr Kernel nibbles_bf16(const char* name) {
  Kernel kernel = nibbles(name);
  kernel.prepare = prepare_f32;
  kernel.run = bytes_run<NibbleBf16>;
  kernel.bf16_table = true;
  return kernel;
}

constexpr Kernel nibbles_pair(const char* name) {
  Kernel kernel = nibbles(name);
  kernel.scope = Scope::kPair;
  kernel.run = bytes_run<NibblePair>;
  return kernel;
}

constexpr Kernel kNibbleKernels[] = {nibbles(LOWBIT_NAME("gemv", "f32", "bytelut4")),
                                     nibbles_pair(LOWBIT_NAME("gemv", "f32", "bytepairlut4")),
                                     nibbles_bf16(LOWBIT_NAME("gemv", "f32", "bf16lut4"))};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
