// Products of blocks of GGUF with few rows of x. A lane holds the nibbles of 8 weights, so that 16 lanes shifted by
// those of one weight are indices of the 16 levels. The weights of such a step are 8 apart, and x is brought into this
// order.
#pragma once

#include "cpu/structured/block_fields-inl.h"
#include "cpu/structured/tiles-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kHalf = kBlockWeights / 2;  // weights of a vector of nibbles

struct BlockHalves {
  I nibbles[2];
  F scales[2];
};

// Constants of shuffles and shifts, an element for each i.
template <class T>
struct Constants {
  alignas(64) T v[64 / sizeof(T)];
  template <class Of>
  constexpr explicit Constants(Of of) : v() {
    for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) v[i] = static_cast<T>(of(i));
  }
};
using Bytes = Constants<uint8_t>;
using Dwords = Constants<uint32_t>;
template <int kBits, int kCount>
constexpr Dwords kShifts([](int i) { return kBits * (i % kCount); });
constexpr Dwords kShiftsOfPairs([](int i) { return 2 * i; });
// Bytes of qwords that begin at bits 0, 7, 14 and 21, or 32 bits on.
constexpr Bytes kSevens([](int i) { return 7 * (i % 4); });
constexpr Bytes kUpperSevens([](int i) { return 32 + 7 * (i % 4); });
// Dword i: byte 8 (g / 4) + g % 4 for g = i of a half: of the low four bytes of each qword.
template <int kPart>
constexpr Bytes kNumberOfQwords([](int i) {
  const int group = 16 * kPart + i / 4;
  return 8 * (group / 4) + group % 4;
});
// Bytes 0 and 1 of qword q: those of groups 2 q and 2 q + 1 of a half, where the low four of a qword are used, or all.
template <int kPart>
constexpr Bytes kPairOfQwords([](int i) {
  const int group = 16 * kPart + i / 8 * 2 + i % 2;
  return 8 * (group / 4) + group % 4;
});
// Two bits of 16 for each byte, then by these the highest bits of its two nibbles.
constexpr Bytes kTwoBits([](int i) { return 2 * (i % 8); });
constexpr Bytes kHighOfTwo([](int i) { return (i & 1) * 8 | (i & 2) * 64; });
// Of bytes that repeat in lanes of 16, one above 0: dword i from byte i / 4, or i / 2; or word i / 4.
constexpr Bytes kByteOfRun([](int i) { return i % 4 == 1 ? i / 16 : 0x80; });
constexpr Bytes kByteOfTwo([](int i) { return i % 4 == 1 ? i / 8 : 0x80; });
constexpr Bytes kWordOfRun([](int i) { return i % 4 == 1 || i % 4 == 2 ? i / 16 * 2 + i % 4 - 1 : 0x80; });
constexpr Bytes kScaleWord([](int i) { return i % 4 < 2 ? i / 16 * 2 + i % 4 : 0x80; });
// The scale of group i of a half, of those of 16 weights, or of 32.
template <int kPart>
constexpr Dwords kScaleOf16([](int i) { return 8 * kPart + i / 2; });
template <int kPart>
constexpr Dwords kScaleOf32([](int i) { return 4 * kPart + i / 4; });
// Those of 32 in the upper dwords of qwords.
template <int kPart>
constexpr Dwords kScaleOfQwords([](int i) { return 2 * (4 * kPart + i / 4) + 1; });

inline I bytes_at(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I words_at(const uint8_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline I dword_of(const uint8_t* p) { return set1_i(static_cast<int32_t>(dword_at(p))); }
inline I qword_of(const uint8_t* p) { return _mm512_set1_epi64(static_cast<int64_t>(qword_at(p))); }
inline I shift_each(I v, const Dwords& by) { return _mm512_srlv_epi32(v, load_i(by.v)); }
inline I bytes_of(I v, const Bytes& which) { return _mm512_permutexvar_epi8(load_i(which.v), v); }
// a | (b & mask).
inline I with_bits(I a, I b, uint32_t mask) {
  return _mm512_ternarylogic_epi32(a, b, set1_i(static_cast<int32_t>(mask)), 0xF8);
}
inline I vectors_of(const uint32_t* grid, I numbers) { return _mm512_i32gather_epi32(numbers, grid, 4); }
inline I with_parity(I seven) {
  return _mm512_permutex2var_epi8(load_i(kSignBytes.v), seven, load_i(kSignBytes.v + 64));
}
// Nibbles with highest bits: signs of two groups are the low 16 bits of each qword.
inline I with_signs(I nibbles, I signs) {
  const I two = _mm512_multishift_epi64_epi8(load_i(kTwoBits.v), signs);
  return or_i(nibbles, _mm512_permutexvar_epi8(two, load_i(kHighOfTwo.v)));
}
inline I sign_pairs_at(const uint8_t* p) { return _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)p)); }
// (steps + 1/2) * unit.
inline F half_steps(I steps, float unit) { return fma(to_float(steps), set1(unit), set1(unit / 2)); }
// (2 steps + 1) * d.
inline F odd_steps(I steps, float d) { return fma(to_float(steps), set1(2 * d), set1(d)); }
inline F scales_of(F scales, const Dwords& which) { return _mm512_permutexvar_ps(load_i(which.v), scales); }
// 16 nibbles of a qword.
inline I sixteen_nibbles(const uint8_t* p) {
  const I both = _mm512_inserti64x4(dword_of(p), _mm256_set1_epi32(static_cast<int>(dword_at(p + 4))), 1);
  return bit_and(shift_each(both, kShifts<4, 8>), set1_i(15));
}

template <StructuredCodec kCodec>
LOWBIT_INLINE inline BlockHalves read_halves(const uint8_t* p, const uint32_t* grid) {
  using enum StructuredCodec;
  BlockHalves b;
  if constexpr (kCodec == kIq2Xxs) {
    const I v = load_i(p + 2), signs = with_parity(_mm512_multishift_epi64_epi8(load_i(kUpperSevens.v), v));
    // The upper dwords have the scales.
    const F scales = half_steps(_mm512_srli_epi32(v, 28), half_of(word_at(p)) * 0.25f);
    unroll<2>([&](auto h) LOWBIT_INLINE {
      const I numbers = _mm512_maskz_permutexvar_epi8(0x1111111111111111, load_i(kNumberOfQwords<h>.v), v);
      b.nibbles[h] = with_signs(vectors_of(grid, numbers), bytes_of(signs, kPairOfQwords<h>));
      b.scales[h] = scales_of(scales, kScaleOfQwords<h>);
    });
  } else if constexpr (kCodec == kIq2Xs || kCodec == kIq2S) {
    const F scales = half_steps(sixteen_nibbles(p + (kCodec == kIq2Xs ? 66 : 74)), half_of(word_at(p)) * 0.25f);
    unroll<2>([&](auto h) LOWBIT_INLINE {
      if constexpr (kCodec == kIq2Xs) {
        const I words = words_at(p + 2 + 32 * h);
        const I signs = with_parity(_mm512_srli_epi32(words, 9));
        // A byte a dword: the second group of a qword is moved next to the first.
        const I pairs = or_i(signs, _mm512_srli_epi64(signs, 24));
        b.nibbles[h] = with_signs(vectors_of(grid, bit_and(words, set1_i(511))), pairs);
      } else {
        const I high = _mm512_shuffle_epi8(dword_of(p + 66 + 4 * h), load_i(kByteOfRun.v));
        const I numbers = with_bits(bytes_at(p + 2 + 16 * h), shift_each(high, kShifts<2, 4>), 0x300);
        b.nibbles[h] = with_signs(vectors_of(grid, numbers), sign_pairs_at(p + 34 + 16 * h));
      }
      b.scales[h] = scales_of(scales, kScaleOf16<h>);
    });
  } else if constexpr (kCodec == kIq3Xxs || kCodec == kIq3S) {
    I signs;
    F scales;
    if constexpr (kCodec == kIq3Xxs) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 66));
      signs = with_parity(_mm512_multishift_epi64_epi8(load_i(kSevens.v), _mm512_cvtepu32_epi64(both)));
      scales = half_steps(_mm512_castsi256_si512(_mm256_srli_epi32(both, 28)), half_of(word_at(p)) * 0.5f);
    } else {
      scales = odd_steps(bit_and(shift_each(dword_of(p + 106), kShifts<4, 8>), set1_i(15)), half_of(word_at(p)));
    }
    unroll<2>([&](auto h) LOWBIT_INLINE {
      const I words = words_at(p + 2 + 32 * h);
      I even = bit_and(words, set1_i(255)), odd = shift_right<8>(words);
      if constexpr (kCodec == kIq3S) {
        const I ninth = shift_each(dword_of(p + 66 + 4 * h), kShiftsOfPairs);
        even = with_bits(even, shift_left<8>(ninth), 256);
        odd = with_bits(odd, shift_left<7>(ninth), 256);
      }
      const I nibbles = or_i(vectors_of(grid, even), shift_left<16>(vectors_of(grid, odd)));
      if constexpr (kCodec == kIq3S) {
        b.nibbles[h] = with_signs(nibbles, sign_pairs_at(p + 74 + 16 * h));
      } else {
        b.nibbles[h] = with_signs(nibbles, bytes_of(signs, kPairOfQwords<h>));
      }
      b.scales[h] = scales_of(scales, kScaleOf32<h>);
    });
  } else if constexpr (kCodec == kIq1S) {
    const I runs = _mm512_castsi256_si512(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 34))));
    const F scales = odd_steps(bit_and(shift_right<12>(runs), set1_i(7)), half_of(word_at(p)));
    unroll<2>([&](auto h) LOWBIT_INLINE {
      const I run = _mm512_shuffle_epi8(qword_of(p + 34 + 8 * h), load_i(kWordOfRun.v));  // from bit 8 on
      const I numbers = with_bits(bytes_at(p + 2 + 16 * h), shift_each(run, kShifts<3, 4>), 0x700);
      const I minus = _mm512_srai_epi32(shift_left<8>(run), 31);
      b.nibbles[h] = with_bits(vectors_of(grid, numbers), minus, 0x88888888);
      b.scales[h] = scales_of(scales, kScaleOf32<h>);
    });
  } else {
    const I words = _mm512_shuffle_epi8(qword_of(p + 48), load_i(kScaleWord.v));
    const F scales = odd_steps(bit_and(shift_each(words, kShifts<3, 4>), set1_i(7)), half_of_nibbles(p + 48));
    unroll<2>([&](auto h) LOWBIT_INLINE {
      // Nibbles from bit 8 on.
      const I two = _mm512_shuffle_epi8(qword_of(p + 32 + 8 * h), load_i(kByteOfTwo.v));
      const I high = shift_each(two, kShifts<4, 2>);
      const I minus = _mm512_srai_epi32(shift_left<20>(high), 31);
      const I numbers = with_bits(bytes_at(p + 16 * h), high, 0x700);
      b.nibbles[h] = with_bits(vectors_of(grid, numbers), minus, 0x88888888);
      b.scales[h] = scales_of(scales, kScaleOf16<h>);
    });
  }
  return b;
}

// Halves of blocks of x, step by step.
void prepare_blocks(const StructuredLinear& l) {
  prepare_rows(l);
  for (int64_t block = 0; block < l.m * l.padded_k; block += kBlockWeights) {
    float* x = l.prepared + block;
    alignas(64) float ordered[kBlockWeights];
    for (int i = 0; i < kBlockWeights; ++i) ordered[i] = x[i / kHalf * kHalf + i % 16 * 8 + i % kHalf / 16];
    __builtin_memcpy(x, ordered, sizeof ordered);
  }
}

// sums[r] += the products of weights [begin, end) of a row, whole blocks, with row r of x.
template <StructuredCodec kCodec, int kRows>
void multiply_blocks(const StructuredLinear& l, int64_t row, int64_t begin, int64_t end, F* sums_of_rows) {
  const uint8_t* block = l.w.codes + row * l.w.row_bytes + begin / kBlockWeights * BlockOf<kCodec>::kBytes;
  const F levels = load(l.w.table);
  F sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = sums_of_rows[r];
  for (int64_t k = begin; k < end; k += kBlockWeights, block += BlockOf<kCodec>::kBytes) {
    const BlockHalves b = read_halves<kCodec>(block, l.w.grid);
    unroll<2>([&](auto h) LOWBIT_INLINE {
      F weights[8];
      unroll<8>([&](auto step) LOWBIT_INLINE {
        weights[step] = _mm512_permutexvar_ps(_mm512_srli_epi32(b.nibbles[h], 4 * step), levels);
      });
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const float* x = l.prepared + r * l.padded_k + k + h * kHalf;
        F sum = mul(weights[0], load(x));
        unroll<7>([&](auto i) LOWBIT_INLINE { sum = fma(weights[i + 1], load(x + 16 * (i + 1)), sum); });
        sums[r] = fma(sum, b.scales[h], sums[r]);
      });
    });
  }
  for (int r = 0; r < kRows; ++r) sums_of_rows[r] = sums[r];
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
