// What products of structured weights share: rows of x, tiles of rows of the weight, the bias, and what leaves for the
// result.
#pragma once

#include <type_traits>

#include "cpu/structured/structured.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// x in fp32, in its order.
inline void prepare_rows(const StructuredLinear& l) {
  for (int64_t m = 0; m < l.m; ++m) {
    float* out = l.prepared + m * l.padded_k;
    int64_t i = 0;
    for (; i + kVecLanes <= l.w.k; i += kVecLanes) store(out + i, load_as(l.x, l.x_dtype, m * l.x_stride + i));
    if (i < l.w.k) {
      store(out + i, load_tail(l.x, l.x_dtype, m * l.x_stride + i, l.w.k - i));
      i += kVecLanes;
    }
    for (; i < l.padded_k; i += kVecLanes) store(out + i, zero());
  }
}

// Tiles of rows of the weight: y + bias. `multiply(rows, n0, count, y)` sets y[r][i] to the product of row n0 + i of
// the weight with row r of x, for i below `count`; r is below `rows`, an integral_constant.
using Tile = float[kStructuredRows][kStructuredTile];
template <class Multiply>
void multiply_tiles(const StructuredLinear& l, int64_t begin, int64_t end, const Multiply& multiply) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n0 = task * kStructuredTile;
    const int64_t count = l.w.n - n0 < kStructuredTile ? l.w.n - n0 : kStructuredTile;
    alignas(64) Tile tile = {};
    const auto run = [&](auto rows) { multiply(rows, n0, count, tile); };
    switch (l.m) {
      case 1:
        run(std::integral_constant<int, 1>{});
        break;
      case 2:
        run(std::integral_constant<int, 2>{});
        break;
      case 3:
        run(std::integral_constant<int, 3>{});
        break;
      case 4:
        run(std::integral_constant<int, 4>{});
        break;
      case 5:
        run(std::integral_constant<int, 5>{});
        break;
      case 6:
        run(std::integral_constant<int, 6>{});
        break;
      case 7:
        run(std::integral_constant<int, 7>{});
        break;
      default:
        run(std::integral_constant<int, 8>{});
        break;
    }
    if (l.bias) {
      alignas(64) float bias[kStructuredTile];
      for (int64_t i = 0; i < kStructuredTile; i += kVecLanes) {
        const int64_t rest = count - i < 0 ? 0 : count - i < kVecLanes ? count - i : kVecLanes;
        store(bias + i, load_tail(l.bias, l.bias_dtype, n0 + i, rest));
      }
      for (int64_t m = 0; m < l.m; ++m) {
        for (int64_t i = 0; i < count; ++i) tile[m][i] += bias[i];
      }
    }
    for (int64_t m = 0; m < l.m; ++m) store_as(l.out, l.out_dtype, m * l.w.n + n0, tile[m], count);
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
