// The sparse term S x^T of a weight with outliers: the same number of entries in every row of S, by rows. Compiled
// under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

class Scratch;

struct Outliers {
  int64_t m, n, k, count;  // `count` entries, or none, in each of the n rows of S (n, k)
  const void* x;           // (m, k), unit stride along k
  Dtype x_dtype;
  int64_t x_stride;
  const int32_t* columns;  // (n, count), each in [0, k)
  const void* values;      // (n, count)
  Dtype value_dtype;
  float* out;  // (m, n): sums of fp32 products
  // Set by prepare_columns.
  int64_t tile;      // rows of x that stand side by side in `prepared`: 1 or kOutlierTile
  int64_t padded_k;  // columns, rounded up to whole vectors
  float* prepared;   // x in fp32, (ceil(m / tile), padded_k, tile), 0 beyond m
};
constexpr int64_t kOutlierTile = 16;    // a multiple of every vector
constexpr int64_t kOutlierRows = 64;    // rows of S of a task
constexpr int64_t kOutlierDepth = 256;  // columns of x of a task that prepares it

struct OutlierKernel {
  void (*prepare)(const Outliers& z, int64_t begin, int64_t end);
  // Returns the largest column as an unsigned number; one that is not below k counts as k - 1.
  uint32_t (*run)(const Outliers& z, int64_t begin, int64_t end);
};

// The instruction set of the kernel that runs with a mask.
const char* outliers_isa(uint32_t isa_mask);

// Prepares x with room for `columns` columns, k or more.
void prepare_columns(Outliers* z, int64_t columns, Scratch* scratch, uint32_t isa, int threads);

// Sets `out` on up to `threads` threads (outliers-inl.h). Throws std::invalid_argument if a column is not in [0,
// k).
void multiply_outliers(Outliers request, uint32_t isa, int threads);

}  // namespace lowbit
