// Products of blocks of GGUF with few rows of x. A word holds the numbers of the levels of a vector, 8 or 4 weights,
// and 32 words make a vector of AVX-512: shifted by those of one weight, it indexes 32 levels that repeat, or with the
// bit that lies apart the other levels. So the weights of a step are as far apart as vectors are, and x is brought into
// this order. Lane i of an fp32 sum belongs to words 2 i and 2 i + 1, which share a scale.
#pragma once

#include "cpu/structured/block_fields-inl.h"
#include "cpu/structured/tiles-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kWords = 32;  // of a vector of AVX-512

template <StructuredCodec kCodec>
struct BlockWords {
  static constexpr int kSteps = BlockOf<kCodec>::kVector;
  static constexpr int kParts = kBlockWeights / (kWords * kSteps);
  I codes[kParts], flips[kParts];  // flips: bit j of a word is that of step j
  F scales[kParts];
};

// Constants of shuffles.
template <class T, int kCount>
struct Constants {
  alignas(64) T v[kCount];
  template <class Of>
  constexpr explicit Constants(Of of) : v() {
    for (int i = 0; i < kCount; ++i) v[i] = static_cast<T>(of(i));
  }
};
template <class T, int kCount = 64 / sizeof(T)>
struct ConstantsOf {
  template <class Of>
  static constexpr Constants<T, kCount> make(Of of) {
    return Constants<T, kCount>(of);
  }
};
// Byte 8 (l / 4) + l % 4 for word l: the low four bytes of each qword.
constexpr auto kLowBytes = ConstantsOf<uint8_t>::make([](int i) { return 8 * (i / 8) + i / 2 % 4; });
// Bytes of qwords that begin at bits 0, 7, 14 and 21, or 32 bits on.
constexpr auto kSevens = ConstantsOf<uint8_t>::make([](int i) { return 7 * (i % 4); });
constexpr auto kUpperSevens = ConstantsOf<uint8_t>::make([](int i) { return 32 + 7 * (i % 4); });
// For word l: the sign byte l / 2 of a part, of 8 bytes a qword of which four are used, or of 32 bytes.
template <int kPart>
constexpr auto kSignOfQwords = ConstantsOf<uint8_t>::make([](int i) {
  const int group = 16 * kPart + i / 4;
  return 8 * (group / 4) + group % 4;
});
template <int kPart>
constexpr auto kSignOfBytes = ConstantsOf<uint8_t>::make([](int i) { return 16 * kPart + i / 4; });
// Word l: byte l / 4 of the low eight of a lane, above 0.
constexpr auto kAboveZero = ConstantsOf<uint8_t>::make([](int i) { return i % 2 ? i / 8 : 0x80; });
// The lowest word of each qword, or of each dword, for all its words.
constexpr auto kFirstOfFour = ConstantsOf<uint8_t>::make([](int i) { return i % 16 / 8 * 8 + i % 2; });
constexpr auto kFirstOfTwo = ConstantsOf<uint8_t>::make([](int i) { return i % 16 / 4 * 4 + i % 2; });
// Dword i: word i / 4 of the low four of a lane.
constexpr auto kWordOfFour = ConstantsOf<uint8_t>::make([](int i) { return i % 4 < 2 ? 2 * (i / 16) + i % 4 : 0x80; });
constexpr auto kShift2 = ConstantsOf<uint16_t>::make([](int i) { return 2 * (i % 4); });
constexpr auto kShift3 = ConstantsOf<uint16_t>::make([](int i) { return 3 * (i % 4); });
constexpr auto kShift4 = ConstantsOf<uint16_t>::make([](int i) { return 4 * (i % 2); });
constexpr auto kDwordShift3 = ConstantsOf<uint32_t>::make([](int i) { return 3 * (i % 4); });
constexpr auto kDwordShift4 = ConstantsOf<uint32_t>::make([](int i) { return 4 * (i % 2); });
template <int kPart>
constexpr auto kNibbleOfRun = ConstantsOf<uint32_t>::make([](int i) { return 4 * (4 * kPart + i / 4); });
template <int kPart>
constexpr auto kRun = ConstantsOf<uint32_t>::make([](int i) { return 4 * kPart + i / 4; });

inline I bytes_as_words(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline I low_bytes(I v, const void* which) {
  return _mm512_maskz_permutexvar_epi8(0x5555555555555555, load_i(which), v);
}
inline I with_parity(I seven) {
  return _mm512_permutex2var_epi8(load_i(kSignBytes.v), seven, load_i(kSignBytes.v + 64));
}
// (steps + 1/2) * unit.
inline F half_steps(I steps, float unit) { return fma(to_float(steps), set1(unit), set1(unit / 2)); }
// (2 steps + 1) * d.
inline F odd_steps(I steps, float d) { return fma(to_float(steps), set1(2 * d), set1(d)); }

// words[l] = grid[numbers[l]]; the numbers are below kEntries, bits above those of kEntries do not count.
template <int kEntries>
LOWBIT_INLINE inline I look_up(const uint16_t* grid, I numbers) {
  if constexpr (kEntries == 64) {
    return _mm512_permutex2var_epi16(load_i(grid), numbers, load_i(grid + 32));
  } else {
    const I low = look_up<kEntries / 2>(grid, numbers), high = look_up<kEntries / 2>(grid + kEntries / 2, numbers);
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(numbers, _mm512_set1_epi16(kEntries / 2)), low, high);
  }
}

template <StructuredCodec kCodec>
LOWBIT_INLINE inline BlockWords<kCodec> read_words(const uint8_t* p, const uint16_t* grid) {
  using enum StructuredCodec;
  BlockWords<kCodec> w;
  if constexpr (kCodec == kIq2Xxs) {
    const I v = load_i(p + 2);
    w.codes[0] = look_up<256>(grid, low_bytes(v, kLowBytes.v));
    w.flips[0] = low_bytes(with_parity(_mm512_multishift_epi64_epi8(load_i(kUpperSevens.v), v)), kLowBytes.v);
    const I steps = _mm512_shuffle_epi32(_mm512_srli_epi64(v, 60), _MM_PERM_CCAA);
    w.scales[0] = half_steps(steps, half_of(word_at(p)) * 0.25f);
  } else if constexpr (kCodec == kIq2Xs || kCodec == kIq2S) {
    if constexpr (kCodec == kIq2Xs) {
      const I v = load_i(p + 2);
      w.codes[0] = look_up<512>(grid, v);
      w.flips[0] = with_parity(_mm512_srli_epi16(v, 9));
    } else {
      const I high =
          _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(qword_at(p + 66))), load_i(kAboveZero.v));
      const I two = _mm512_and_si512(_mm512_srlv_epi16(high, load_i(kShift2.v)), _mm512_set1_epi16(0x300));
      w.codes[0] = look_up<1024>(grid, _mm512_or_si512(bytes_as_words(p + 2), two));
      w.flips[0] = bytes_as_words(p + 34);
    }
    const I bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(p + (kCodec == kIq2Xs ? 66 : 74))));
    const I steps = _mm512_srlv_epi32(_mm512_shuffle_epi32(bytes, _MM_PERM_CCAA), load_i(kDwordShift4.v));
    w.scales[0] = half_steps(bit_and(steps, set1_i(15)), half_of(word_at(p)) * 0.25f);
  } else if constexpr (kCodec == kIq3Xxs) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 66));
    const I sevens = _mm512_multishift_epi64_epi8(load_i(kSevens.v), _mm512_cvtepu32_epi64(both));
    const I signs = with_parity(sevens), steps = _mm512_castsi256_si512(_mm256_srli_epi32(both, 28));
    const float unit = half_of(word_at(p)) * 0.5f;
    unroll<2>([&](auto h) LOWBIT_INLINE {
      w.codes[h] = look_up<256>(grid, bytes_as_words(p + 2 + kWords * h));
      w.flips[h] = _mm512_srlv_epi16(low_bytes(signs, kSignOfQwords<h>.v), load_i(kShift4.v));
      w.scales[h] = half_steps(_mm512_permutexvar_epi32(load_i(kRun<h>.v), steps), unit);
    });
  } else if constexpr (kCodec == kIq3S) {
    const uint64_t high = qword_at(p + 66);
    const I signs = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(p + 74)));
    const I steps = set1_i(static_cast<int32_t>(dword_at(p + 106)));
    const float d = half_of(word_at(p));
    unroll<2>([&](auto h) LOWBIT_INLINE {
      const I low = bytes_as_words(p + 2 + kWords * h);
      const auto ninth = static_cast<__mmask32>(high >> (kWords * h));
      w.codes[h] = look_up<512>(grid, _mm512_mask_add_epi16(low, ninth, low, _mm512_set1_epi16(256)));
      w.flips[h] = _mm512_srlv_epi16(low_bytes(signs, kSignOfBytes<h>.v), load_i(kShift4.v));
      w.scales[h] = odd_steps(bit_and(_mm512_srlv_epi32(steps, load_i(kNibbleOfRun<h>.v)), set1_i(15)), d);
    });
  } else if constexpr (kCodec == kIq1S) {
    const I qwords = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)(p + 34)));
    const I runs = _mm512_shuffle_epi8(qwords, load_i(kFirstOfFour.v));
    const I high = _mm512_slli_epi16(_mm512_srlv_epi16(runs, load_i(kShift3.v)), 8);
    const I three = _mm512_and_si512(high, _mm512_set1_epi16(0x700));
    w.codes[0] = look_up<2048>(grid, _mm512_or_si512(bytes_as_words(p + 2), three));
    w.flips[0] = _mm512_srai_epi16(runs, 15);
    const I steps = _mm512_shuffle_epi32(_mm512_srli_epi64(qwords, 12), _MM_PERM_CCAA);
    w.scales[0] = odd_steps(bit_and(steps, set1_i(7)), half_of(word_at(p)));
  } else {
    const I dwords = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 32)));
    const I nibbles = _mm512_srlv_epi16(_mm512_shuffle_epi8(dwords, load_i(kFirstOfTwo.v)), load_i(kShift4.v));
    const I three = _mm512_and_si512(_mm512_slli_epi16(nibbles, 8), _mm512_set1_epi16(0x700));
    w.codes[0] = look_up<2048>(grid, _mm512_or_si512(bytes_as_words(p), three));
    w.flips[0] = _mm512_srai_epi16(_mm512_slli_epi16(nibbles, 12), 15);
    const I words = _mm512_set1_epi64(static_cast<int64_t>(qword_at(p + 48)));
    const I steps = _mm512_srlv_epi32(_mm512_shuffle_epi8(words, load_i(kWordOfFour.v)), load_i(kDwordShift3.v));
    w.scales[0] = odd_steps(bit_and(steps, set1_i(7)), half_of_nibbles(p + 48));
  }
  return w;
}

// Levels in bf16, for indices of words.
struct WordLevels {
  I plain, flipped;
  explicit WordLevels(const float* levels) {
    alignas(64) uint16_t words[2][kWords];
    for (int i = 0; i < 2 * kWords; ++i) {
      words[i / kWords][i % kWords] =
          static_cast<uint16_t>(dword_at((const uint8_t*)(levels + i / kWords * 8 + i % 8)) >> 16);
    }
    plain = load_i(words[0]);
    flipped = load_i(words[1]);
  }
};

// The weights of step kStep, without their scale, as bf16.
template <int kBits, int kStep>
LOWBIT_INLINE inline I words_of_step(I codes, I flips, const WordLevels& levels) {
  // Bit 5 of an index chooses the table.
  I moved = flips;
  if constexpr (kStep < 5) moved = _mm512_slli_epi16(flips, 5 - kStep);
  if constexpr (kStep > 5) moved = _mm512_srli_epi16(flips, kStep - 5);
  const I index =
      _mm512_ternarylogic_epi32(_mm512_set1_epi16(32), moved, _mm512_srli_epi16(codes, kBits * kStep), 0xCA);
  return _mm512_permutex2var_epi16(levels.plain, index, levels.flipped);
}

// Whether bf16 rows of x stay so: where there are products of pairs of bf16.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif
inline bool multiplies_bf16(const StructuredLinear& l) { return kPairs && l.x_dtype == Dtype::kBf16; }

// Blocks of x in the order of steps; in fp32 first those of even words, then of odd ones.
void prepare_blocks(const StructuredLinear& l) {
  int steps = 0;
  with_codec(l.w.codec, [&](auto codec) { steps = BlockWords<decltype(codec)::value>::kSteps; });
  const int size = size_of(l.x_dtype);
  for (int64_t m = 0; m < l.m; ++m) {
    for (int64_t k = 0; k < l.w.k; k += kBlockWeights) {
      const int64_t count = l.w.k - k < kBlockWeights ? l.w.k - k : kBlockWeights;
      const char* from = static_cast<const char*>(l.x) + (m * l.x_stride + k) * size;
      if (multiplies_bf16(l)) {
        uint16_t values[kBlockWeights] = {};
        __builtin_memcpy(values, from, count * size);
        uint16_t* to = reinterpret_cast<uint16_t*>(l.prepared) + m * l.padded_k + k;
        for (int i = 0; i < kBlockWeights; ++i) {
          const int part = i / (kWords * steps), step = i / kWords % steps, word = i % kWords;
          to[i] = values[part * kWords * steps + word * steps + step];
        }
        continue;
      }
      alignas(64) float values[kBlockWeights];
      int64_t i = 0;
      for (; i + kVecLanes <= count; i += kVecLanes) store(values + i, load_as(from, l.x_dtype, i));
      for (; i < kBlockWeights; i += kVecLanes) {
        store(values + i, i < count ? load_tail(from, l.x_dtype, i, count - i) : zero());
      }
      float* to = l.prepared + m * l.padded_k + k;
      for (i = 0; i < kBlockWeights; ++i) {
        const int64_t part = i / (kWords * steps), step = i / kWords % steps, word = i % 16 * 2 + i / 16 % 2;
        to[i] = values[part * kWords * steps + word * steps + step];
      }
    }
  }
}

template <StructuredCodec kCodec, int kRows, bool kBf16>
LOWBIT_INLINE inline void multiply_blocks(const StructuredLinear& l, int64_t row, const WordLevels& levels, float* y) {
  using Words = BlockWords<kCodec>;
  const uint8_t* block = l.w.codes + row * l.w.row_bytes;
  F sums[kRows];
  for (F& sum : sums) sum = zero();
  for (int64_t k = 0; k < l.w.k; k += kBlockWeights, block += BlockOf<kCodec>::kBytes) {
    const Words words = read_words<kCodec>(block, l.w.grid);
    unroll<Words::kParts>([&](auto part) LOWBIT_INLINE {
      I weights[Words::kSteps];
      unroll<Words::kSteps>([&](auto step) LOWBIT_INLINE {
        weights[step] = words_of_step<BlockOf<kCodec>::kBits, step>(words.codes[part], words.flips[part], levels);
      });
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const int64_t at = r * l.padded_k + k + part * (kWords * Words::kSteps);
        F sum = zero(), other = zero();
        unroll<Words::kSteps>([&](auto step) LOWBIT_INLINE {
          if constexpr (kBf16) {
#if defined(__AVX512BF16__)
            const I x = load_i(reinterpret_cast<const uint16_t*>(l.prepared) + at + step * kWords);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weights[step], (__m512bh)x);
#endif
          } else {
            const float* x = l.prepared + at + step * kWords;
            sum = fma(as_float(shift_left<16>(weights[step])), load(x), sum);
            other =
                fma(as_float(bit_and(weights[step], set1_i(static_cast<int32_t>(0xFFFF0000)))), load(x + 16), other);
          }
        });
        if constexpr (!kBf16) sum = add(sum, other);
        sums[r] = fma(sum, words.scales[part], sums[r]);
      });
    });
  }
  for (int r = 0; r < kRows; ++r) y[r] += sum_lanes(sums[r]);
}

template <bool kBf16>
void multiply_block_rows_of(const StructuredLinear& l, int64_t begin, int64_t end) {
  const WordLevels levels(l.w.table);
  with_codec(l.w.codec, [&](auto codec) {
    multiply_tiles(l, begin, end, [&](auto rows, int64_t row, float* y) {
      multiply_blocks<decltype(codec)::value, decltype(rows)::value, kBf16>(l, row, levels, y);
    });
  });
}

void multiply_block_rows(const StructuredLinear& l, int64_t begin, int64_t end) {
  if constexpr (kPairs) {
    if (multiplies_bf16(l)) return multiply_block_rows_of<true>(l, begin, end);
  }
  multiply_block_rows_of<false>(l, begin, end);
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
