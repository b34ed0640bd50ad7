// FP8 of few rows decoded by way of fp16 (fp8_f16c-inl.h): K in the lanes reads b once, and decoding is most of the
// time. a is prepared with the factor. 32 codes take 16 (E4M3) or 4 operations and 4 conversions of two.
//
// Where groups of 16 end in a sum, its lanes 0 .. 3 hold products of the first 16 of 32 values and lanes 4 .. 7 those
// of the others: a step takes 4 values of either half into a vector. That permutation costs a quarter of the speed.
#pragma once

#include "cpu/fp8/fp8_f16c-inl.h"
#include "cpu/fp8/fp8_matmul_f32-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// `count` scales from number i on as fp32.
inline void load_scales(const Fp8Scales& s, int64_t i, int64_t count, float* out) {
  if (s.type == ScaleType::kF32) {
    __builtin_memcpy(out, static_cast<const float*>(s.values) + i, count * sizeof(float));
    return;
  }
  const auto fill = [&](const auto& bits_at) LOWBIT_INLINE {
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t bits = bits_at(i + j);
      __builtin_memcpy(out + j, &bits, sizeof bits);
    }
  };
  if (s.type == ScaleType::kBf16) {
    fill([words = static_cast<const uint16_t*>(s.values)](int64_t j)
             LOWBIT_INLINE { return uint32_t{words[j]} << 16; });
  } else {
    fill([codes = static_cast<const uint8_t*>(s.values)](int64_t j) LOWBIT_INLINE { return e8m0_bits(codes[j]); });
  }
}

template <Float8 T>
struct Fp8F16c : Fp8F32<T> {
  static constexpr int kStep = 32;
  static constexpr int kChains = 4;
  static constexpr bool kShortTiles = true;

  struct Vectors {
    F of[4];
  };
  LOWBIT_INLINE static void fetch(const uint8_t* codes) { prefetch(codes + 2048); }
  // Over the factor. kHalves: 4 values of either half in a vector.
  template <bool kHalves = false>
  LOWBIT_INLINE static Vectors decode(const uint8_t* codes) {
    I bytes = load_i(codes);
    if constexpr (kHalves) bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const I low = words_of<T>(_mm256_unpacklo_epi8(_mm256_setzero_si256(), bytes));
    const I high = words_of<T>(_mm256_unpackhi_epi8(_mm256_setzero_si256(), bytes));
    return {{low_halves(low), low_halves(high), high_halves(low), high_halves(high)}};
  }
  template <int kChains>
  LOWBIT_INLINE static void dot(F* acc, const float* x, const Vectors& w) {
    unroll<4>([&](auto i)
                  LOWBIT_INLINE { acc[i % kChains] = fma(load(x + i * kVecLanes), w.of[i], acc[i % kChains]); });
  }
  LOWBIT_INLINE static F scales(const Fp8Scales& s, int64_t row, int64_t k, int64_t) {
    return set1(scale_of(s, row, k));
  }

  // As few_tile, with groups of 16 or 32. Scales of b are loaded for many steps at a time.
  template <int kRows, int kCols>
  static void short_tile(const Fp8Matmul& q, int64_t n0, float (*y)[kFp8FewRowsColumns]) {
    if (shift_of(q) == 4) {
      tile_of_groups<kRows, kCols, 4>(q, n0, y);
    } else {
      tile_of_groups<kRows, kCols, 5>(q, n0, y);
    }
  }
  static void prepare_lanes(const Fp8Matmul& q, const uint8_t* codes, float* out) {
    const float other = q.b.type == Float8::kE4m3 ? kWordFactor<Float8::kE4m3> : kWordFactor<Float8::kE5m2>;
    const F factor = set1(kWordFactor<T> * other);
    for (int64_t k = 0; k < kFp8PadK; k += kStep) {
      const Vectors v = shift_of(q) == 4 ? decode<true>(codes + k) : decode(codes + k);
      for (int64_t i = 0; i < 4; ++i) store(out + k + i * kVecLanes, mul(v.of[i], factor));
    }
  }

 private:
  template <int kRows, int kCols, int kShift>
  LOWBIT_INLINE static void tile_of_groups(const Fp8Matmul& q, int64_t n0, float (*y)[kFp8FewRowsColumns]) {
    constexpr int64_t kPiece = 64 * kStep;
    const FewTile<Fp8F16c, kRows, kCols> at(q, n0);
    const Fp8Scales& s = q.b.scales;
    const int64_t k_size = q.out.k, groups = ((k_size - 1) >> kShift) + 2;
    // And a zero, as in row_scales.
    alignas(64) float b_scales[kCols][(kPiece >> kShift) + 1];
    F total[kRows][kCols];
    const auto each = [&](const auto& fn) LOWBIT_INLINE {
      unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kCols>([&](auto c) LOWBIT_INLINE { fn(r, c); }); });
    };
    each([&](auto r, auto c) LOWBIT_INLINE { total[r][c] = zero(); });
    for (int64_t k0 = 0; k0 < k_size; k0 += kPiece) {
      const int64_t end = k_size - k0 < kPiece ? k_size - k0 : kPiece, count = ((end - 1) >> kShift) + 1;
      for (int c = 0; c < kCols; ++c) {
        const int64_t first = (at.columns[c] >> s.row_shift) * s.stride;
        if (s.k_shift == kShift) {
          load_scales(s, first + (k0 >> kShift), count, b_scales[c]);
        } else {
          for (int64_t i = 0; i < count; ++i) b_scales[c][i] = scale_of(s, at.columns[c], k0 + (i << kShift));
        }
        b_scales[c][count] = 0;
      }
      const auto step = [&](int64_t k, auto c, const uint8_t* codes) LOWBIT_INLINE {
        const Vectors w = decode<kShift == 4>(codes);
        const F sb = spread<kShift>(b_scales[c] + (k >> kShift));
        unroll<kRows>([&](auto r) LOWBIT_INLINE {
          const float* x = at.a[r] + k0 + k;
          const F low = fma(load(x + kVecLanes), w.of[1], mul(load(x), w.of[0]));
          const F high = fma(load(x + 3 * kVecLanes), w.of[3], mul(load(x + 2 * kVecLanes), w.of[2]));
          const F sa = spread<kShift>(q.a_scales + at.rows[r] * groups + ((k0 + k) >> kShift));
          total[r][c] = fma(mul(add(low, high), sa), sb, total[r][c]);
        });
      };
      int64_t k = 0;
      for (; k + kStep <= end; k += kStep) {
        unroll<kCols>([&](auto c) LOWBIT_INLINE {
          fetch(at.b[c] + k0 + k);
          step(k, c, at.b[c] + k0 + k);
        });
      }
      if (k < end) {
        unroll<kCols>([&](auto c) LOWBIT_INLINE {
          alignas(32) uint8_t last[kStep] = {};
          __builtin_memcpy(last, at.b[c] + k0 + k, end - k);
          step(k, c, last);
        });
      }
    }
    store_sums<kRows, kCols>(total, n0, y);
  }
  // The scales of a step: one, or those of two groups of 16.
  template <int kShift>
  LOWBIT_INLINE static F spread(const float* scales) {
    if constexpr (kShift == 5) return set1(*scales);
    return _mm256_blend_ps(set1(scales[0]), set1(scales[1]), 0xF0);
  }
};

using Fp8F16cFamily = Fp8TypedFamily<Fp8F16c>;

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
