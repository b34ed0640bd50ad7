#include "cpu/fp8/fp8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"

namespace lowbit {

const Fp8Ops& fp8_ops_scalar();
const Fp8Ops& fp8_ops_avx2();
const Fp8Ops& fp8_ops_avx512();

const Fp8Ops& fp8_ops(uint32_t isa_mask) {
  return isa_mask & kAvx512 ? fp8_ops_avx512() : isa_mask & kAvx2 ? fp8_ops_avx2() : fp8_ops_scalar();
}

namespace {

constexpr int64_t kColumnUnit = 256;  // where columns are split between threads: whole vectors, whole cache lines

// Calls fn(region, thread) for regions that cover the matrix, split by bands of `band` rows or, where they are fewer
// than the threads, by columns in multiples of `unit`.
template <class Fn>
void split(int64_t rows, int64_t k, int64_t band, int64_t unit, int threads, const Fn& fn) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  // Below this many elements a second thread costs more than it saves.
  if (rows * k < 64 * 1024) threads = 1;
  const int64_t bands = ceil_div(rows, band), units = ceil_div(k, unit);
  const bool by_rows = bands >= threads || bands >= units;
  const int64_t tasks = by_rows ? bands : units;
  parallel_threads(tasks <= 1 ? 1 : threads, [&](int64_t index, int64_t count) {
    const int64_t begin = tasks * index / count, end = tasks * (index + 1) / count;
    if (begin == end) return;
    fn(by_rows ? Fp8Region{begin * band, std::min(end * band, rows), 0, k}
               : Fp8Region{0, rows, begin * unit, std::min(end * unit, k)},
       index);
  });
}

int64_t unit_of(const Fp8Blocks& b, bool any_columns) {
  return any_columns ? kColumnUnit : (kColumnUnit + b.block_k - 1) / b.block_k * b.block_k;
}

using Bytes = uint8_t __attribute__((vector_size(16)));
constexpr int kTile = 16;

#define LOWBIT_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LOWBIT_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
// out[c] = column c of the 16 x 16 bytes at `in`. Interleaving rows i and i + 8 four times turns rows into columns.
void transpose_tile(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  Bytes rows[kTile], next[kTile];
  for (int i = 0; i < kTile; ++i) std::memcpy(&rows[i], in + i * in_stride, kTile);
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < kTile / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], LOWBIT_LOW);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], LOWBIT_HIGH);
    }
    std::memcpy(rows, next, sizeof rows);
  }
  for (int i = 0; i < kTile; ++i) std::memcpy(out + i * out_stride, &rows[i], kTile);
}
#undef LOWBIT_LOW
#undef LOWBIT_HIGH

// Rows that are transposed while they are in cache. Each writes a part of every row of q^T, which lie on pages of their
// own: 64 rows fill cache lines, but take twice as long as 256.
constexpr int64_t kTransposedRows = 256;

// out (k, rows) of the region of q (rows, k).
void transpose(const uint8_t* q, int64_t rows, int64_t k, const Fp8Region& r, uint8_t* out) {
  for (int64_t c = r.column; c < r.column_end; c += kTile) {
    const int64_t columns = std::min<int64_t>(kTile, r.column_end - c);
    for (int64_t row = r.row; row < r.row_end; row += kTile) {
      const int64_t height = std::min<int64_t>(kTile, r.row_end - row);
      if (columns == kTile && height == kTile) {
        transpose_tile(q + row * k + c, k, out + c * rows + row, rows);
      } else {
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x = 0; x < columns; ++x) out[(c + x) * rows + row + y] = q[(row + y) * k + c + x];
        }
      }
    }
  }
}

}  // namespace

void fp8_maxima(const Fp8Ops& ops, const Fp8Blocks& blocks, const Fp8Source& x, float* maxima, int threads) {
  const int64_t rows = blocks.rows, k = blocks.k;
  if (blocks.row_blocks != 0) {
    split(rows, k, blocks.block_rows, unit_of(blocks, false), threads,
          [&](const Fp8Region& r, int64_t) { ops.maxima(blocks, x, r, maxima); });
    return;
  }
  std::vector<float> partial(threads, 0.0f);
  split(rows, k, 1, kColumnUnit, threads,
        [&](const Fp8Region& r, int64_t thread) { partial[thread] = ops.largest(x, r); });
  float largest = 0;
  for (float v : partial) {
    if (std::isnan(v) || v > largest) largest = v;  // NaN stays: nothing is greater
  }
  *maxima = largest;
}

void fp8_quantize(const Fp8Ops& ops, const Fp8Quantize& request, uint8_t* transposed, int threads) {
  const Fp8Blocks& b = request.blocks;
  Fp8Quantize z = request;
  float largest;
  if (b.row_blocks == 0 && !z.maxima) {
    fp8_maxima(ops, b, z.x, &largest, threads);
    z.maxima = &largest;
  }
  // Threads that write to a row of q^T do not share cache lines, unless there are few rows.
  const int64_t height = b.rows >= kTransposedRows * threads ? kTransposedRows : b.rows >= 64 * threads ? 64 : kTile;
  const int64_t band = std::max<int64_t>(b.block_rows, transposed ? height : 1);
  split(b.rows, b.k, band, unit_of(b, b.row_blocks == 0), threads, [&](const Fp8Region& r, int64_t) {
    const int64_t step = transposed ? band : r.row_end - r.row;
    for (int64_t row = r.row; row < r.row_end; row += step) {
      const Fp8Region part{row, std::min(row + step, r.row_end), r.column, r.column_end};
      ops.quantize(z, part);
      if (transposed) transpose(z.q, b.rows, b.k, part, transposed);
    }
  });
}

void fp8_dequantize(const Fp8Ops& ops, const Fp8Dequantize& request, int threads) {
  const Fp8Blocks& b = request.blocks;
  split(b.rows, b.k, 1, unit_of(b, b.row_blocks == 0), threads,
        [&](const Fp8Region& r, int64_t) { ops.dequantize(request, r); });
}

void fp8_cast(const Fp8Ops& ops, const void* x, Dtype dtype, int64_t count, Float8 type, bool saturate, uint8_t* q,
              int threads) {
  split(1, count, 1, kColumnUnit, threads,
        [&](const Fp8Region& r, int64_t) { ops.cast({x, dtype, count}, type, saturate, r, q); });
}

}  // namespace lowbit
