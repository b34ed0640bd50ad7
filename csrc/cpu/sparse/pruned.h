// The product with a pruned weight: sixteen rows of it stand side by side, each entry a distance from the one before
// and a code of one table. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

struct Outliers;

constexpr int64_t kPrunedRows = 16;  // of a block, a multiple of every vector
constexpr int kPrunedEntries = 256;  // of a table, as the kernels read it

// Steps of a block: entry i of each of its rows, first the distances, then the codes. The column of an entry is that of
// the one before, or -1, plus the distance plus 1; one of k or more counts as 0. Rows beyond n and entries behind a
// row's last one have code 0, whose value is 0.
struct Pruned {
  int64_t m, n, k;
  const void* x;  // (m, k), unit stride along k
  Dtype x_dtype;
  int64_t x_stride;
  const uint8_t* entries;  // (steps of all blocks, 2, kPrunedRows)
  const int64_t* starts;   // (blocks + 1): the first step of each block; checked by multiply_pruned
  int64_t steps;
  const float* table;  // (1 << bits)
  int bits;
  float* out;  // (m, n): sums of fp32 products
  // Set by multiply_pruned: x as the outliers' kernels take it, with a column of zeros at k; the table up to
  // kPrunedEntries with zeros.
  const Outliers* prepared;
  const float* values;
};

// Tasks are a tile of rows of x times a block.
using MultiplyPruned = void (*)(const Pruned& z, int64_t begin, int64_t end);

// The instruction set of the kernel that runs with a mask.
const char* pruned_isa(uint32_t isa_mask);

// Sets `out` on up to `threads` threads. Throws std::invalid_argument if `starts` does not ascend from 0 to `steps`.
void multiply_pruned(Pruned request, uint32_t isa, int threads);

}  // namespace lowbit
