// One row of x: the rows of a block lie in the lanes, and each lane gathers its own elements. More rows of x stand side
// by side, and each entry multiplies all of them. Either way a row's products are added in the order of its entries.
#pragma once

#include "cpu/sparse/outliers.h"
#include "cpu/sparse/pruned.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int64_t kStepBytes = 2 * kPrunedRows;

// Tables of many entries lie in memory.
struct TableInMemory {
  const float* values;
  explicit TableInMemory(const float* v) : values(v) {}
  F operator()(I code) const { return load_indexed(values, code); }
};

template <class Values>
void gather_block(const Pruned& z, const uint8_t* begin, const uint8_t* end, const float* x, float* y) {
  constexpr int kParts = kPrunedRows / kVecLanes;
  const Values values(z.values);
  const I one = set1_i(1), last = set1_i(static_cast<int32_t>(z.k));
  I column[kParts];
  F sums[kParts];
  for (int p = 0; p < kParts; ++p) {
    column[p] = set1_i(-1);
    sums[p] = zero();
  }
  for (const uint8_t* step = begin; step < end; step += kStepBytes) {
    unroll<kParts>([&](auto p) LOWBIT_INLINE {
      const uint8_t* own = step + p * kVecLanes;
      column[p] = min_u(add_i(column[p], add_i(load_u8_lanes(own), one)), last);
      sums[p] = fma(values(load_u8_lanes(own + kPrunedRows)), load_indexed(x, column[p]), sums[p]);
    });
  }
  for (int p = 0; p < kParts; ++p) store(y + p * kVecLanes, sums[p]);
}

// y (kRows, kOutlierTile) of rows from `row` on.
template <int kRows>
void multiply_rows(const Pruned& z, const uint8_t* begin, const uint8_t* end, int64_t row, const float* x, float* y) {
  constexpr int kParts = kOutlierTile / kVecLanes;
  const uint32_t last = static_cast<uint32_t>(z.k);
  uint32_t column[kRows];
  F sums[kRows][kParts];
  for (int r = 0; r < kRows; ++r) {
    column[r] = ~0u;
    for (int p = 0; p < kParts; ++p) sums[r][p] = zero();
  }
  for (const uint8_t* step = begin + row; step < end + row; step += kStepBytes) {
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      const uint32_t next = column[r] + step[r] + 1;
      column[r] = next < last ? next : last;
      const F value = set1(z.values[step[kPrunedRows + r]]);
      const float* at = x + int64_t{column[r]} * kOutlierTile;
      unroll<kParts>([&](auto p) LOWBIT_INLINE { sums[r][p] = fma(value, load(at + p * kVecLanes), sums[r][p]); });
    });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kParts; ++p) store(y + r * kOutlierTile + p * kVecLanes, sums[r][p]);
  }
}

void multiply_pruned_blocks(const Pruned& z, int64_t begin, int64_t end) {
  constexpr int kRows = kVecLanes == 16 ? 8 : 4;
  const Outliers& p = *z.prepared;
  const int64_t blocks = ceil_div(z.n, kPrunedRows);
  alignas(64) float y[kPrunedRows * kOutlierTile];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m0 = task / blocks * p.tile, block = task % blocks;
    const uint8_t* first = z.entries + z.starts[block] * kStepBytes;
    const uint8_t* behind = z.entries + z.starts[block + 1] * kStepBytes;
    const float* x = p.prepared + m0 * p.padded_k;
    if (p.tile != 1) {
      for (int64_t row = 0; row < kPrunedRows; row += kRows) {
        multiply_rows<kRows>(z, first, behind, row, x, y + row * kOutlierTile);
      }
    } else if (z.bits <= 4) {
      gather_block<Table<4>>(z, first, behind, x, y);
    } else if (z.bits == 5) {
      gather_block<Table<5>>(z, first, behind, x, y);
    } else {
      gather_block<TableInMemory>(z, first, behind, x, y);
    }
    const int64_t rows = z.m - m0 < p.tile ? z.m - m0 : p.tile, n0 = block * kPrunedRows;
    const int64_t count = z.n - n0 < kPrunedRows ? z.n - n0 : kPrunedRows;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < count; ++i) z.out[(m0 + r) * z.n + n0 + i] = y[i * p.tile + r];
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
