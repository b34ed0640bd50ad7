// The sparse term of a weight with outliers: each entry multiplies one element of x, or one of each row of a tile.
#pragma once

#include "cpu/sparse/outliers.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// out[0, count) = x[at, at + count) in fp32; out has room for whole vectors.
inline void to_floats(const void* x, Dtype dtype, int64_t at, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) store(out + i, load_as(x, dtype, at + i));
  if (i < count) store(out + i, load_tail(x, dtype, at + i, count - i));
}

constexpr int64_t kEntries = 1024;  // whose values are converted at a time
constexpr int kTileParts = kOutlierTile / kVecLanes;

// Tasks are a tile of rows of x times kOutlierDepth of its columns.
void prepare_outliers(const Outliers& z, int64_t begin, int64_t end) {
  const int64_t depths = ceil_div(z.k, kOutlierDepth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m0 = task / depths * z.tile, k_begin = task % depths * kOutlierDepth;
    const int64_t count = z.k - k_begin < kOutlierDepth ? z.k - k_begin : kOutlierDepth;
    if (z.tile == 1) {
      to_floats(z.x, z.x_dtype, m0 * z.x_stride + k_begin, count, z.prepared + m0 * z.padded_k + k_begin);
      continue;
    }
    alignas(64) float rows[kOutlierTile][kOutlierDepth];
    for (int64_t r = 0; r < kOutlierTile; ++r) {
      if (m0 + r < z.m) {
        to_floats(z.x, z.x_dtype, (m0 + r) * z.x_stride + k_begin, count, rows[r]);
      } else {
        __builtin_memset(rows[r], 0, sizeof rows[r]);
      }
    }
    float* out = z.prepared + (m0 * z.padded_k + k_begin * kOutlierTile);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < kOutlierTile; ++r) out[i * kOutlierTile + r] = rows[r][i];
    }
  }
}

// A wrong column must not read beyond x. The largest that was met, with negative ones on top, says afterwards whether
// there was one.
struct Columns {
  uint32_t last, largest;
  int64_t at(int32_t column) {
    const uint32_t c = static_cast<uint32_t>(column);
    largest = c > largest ? c : largest;
    return c < last ? c : last;
  }
};

// The product of entries of a row of S with a row of x. Elements of x are read one by one: gather instructions took
// 1.7 times as long (AVX2).
inline float multiply_row(const float* values, const int32_t* columns, int64_t count, Columns& within, const float* x) {
  F sums = zero();
  int64_t j = 0;
  for (; j + kVecLanes <= count; j += kVecLanes) {
    alignas(64) float elements[kVecLanes];
    for (int i = 0; i < kVecLanes; ++i) elements[i] = x[within.at(columns[j + i])];
    sums = fma(load(elements), load(values + j), sums);
  }
  float rest = 0;
  for (; j < count; ++j) rest += values[j] * x[within.at(columns[j])];
  return sum(sums) + rest;
}

// y[kOutlierTile] += the products of entries of a row of S with a tile of rows of x.
inline void multiply_tile(const float* values, const int32_t* columns, int64_t count, Columns& within, const float* x,
                          float* y) {
  F sums[kTileParts];
  unroll<kTileParts>([&](auto p) LOWBIT_INLINE { sums[p] = load(y + p * kVecLanes); });
  for (int64_t j = 0; j < count; ++j) {
    const F value = set1(values[j]);
    const float* at = x + within.at(columns[j]) * kOutlierTile;
    unroll<kTileParts>([&](auto p) LOWBIT_INLINE { sums[p] = fma(value, load(at + p * kVecLanes), sums[p]); });
  }
  unroll<kTileParts>([&](auto p) LOWBIT_INLINE { store(y + p * kVecLanes, sums[p]); });
}

// Tasks are a tile of rows of x times kOutlierRows rows of S; those of one tile follow each other.
uint32_t run_outliers(const Outliers& z, int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(z.n, kOutlierRows);
  // Whole rows of S, or pieces of one.
  const int64_t step = z.count == 0 ? kOutlierRows : z.count < kEntries ? kEntries / z.count : 1;
  Columns within{static_cast<uint32_t>(z.k - 1), 0};
  alignas(64) float values[kEntries];
  alignas(64) float y[kOutlierRows * kOutlierTile];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m0 = task / blocks * z.tile, n0 = task % blocks * kOutlierRows;
    const int64_t n_end = z.n - n0 < kOutlierRows ? z.n : n0 + kOutlierRows;
    const float* x = z.prepared + m0 * z.padded_k;
    __builtin_memset(y, 0, sizeof(float) * (n_end - n0) * z.tile);
    for (int64_t n = n0; n < n_end; n += step) {
      const int64_t rows = n_end - n < step ? n_end - n : step;
      for (int64_t j = 0; j < z.count; j += kEntries) {
        const int64_t count = z.count - j < kEntries ? z.count - j : kEntries, first = n * z.count + j;
        to_floats(z.values, z.value_dtype, first, rows * count, values);
        for (int64_t r = 0; r < rows; ++r) {
          const float* v = values + r * count;
          const int32_t* columns = z.columns + first + r * count;
          float* sums = y + (n + r - n0) * z.tile;
          if (z.tile == 1) {
            *sums += multiply_row(v, columns, count, within, x);
          } else {
            multiply_tile(v, columns, count, within, x, sums);
          }
        }
      }
    }
    const int64_t rows = z.m - m0 < z.tile ? z.m - m0 : z.tile;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = z.out + (m0 + r) * z.n;
      for (int64_t n = n0; n < n_end; ++n) out[n] = y[(n - n0) * z.tile + r];
    }
  }
  return within.largest;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit

#define LOWBIT_EXPORT_OUTLIERS                                       \
  namespace lowbit {                                                 \
  OutlierKernel LOWBIT_CAT(outliers_, LOWBIT_ISA)() {                \
    return {LOWBIT_ISA::prepare_outliers, LOWBIT_ISA::run_outliers}; \
  }                                                                  \
  }
