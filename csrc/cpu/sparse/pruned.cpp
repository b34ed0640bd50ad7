#include "cpu/sparse/pruned.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/costs.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "cpu/sparse/outliers.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(pruned)

const char* pruned_isa(uint32_t isa_mask) { return isa_name(newest(units::pruned::kAll, isa_mask).isa); }

void multiply_pruned(Pruned z, uint32_t isa, int threads) {
  if (z.m == 0 || z.n == 0) return;
  const int64_t blocks = ceil_div(z.n, kPrunedRows);
  if (z.starts[0] != 0 || z.starts[blocks] != z.steps || !std::is_sorted(z.starts, z.starts + blocks + 1)) {
    throw std::invalid_argument("starts must ascend from 0 to the " + std::to_string(z.steps) + " steps of entries");
  }
  Outliers x{};
  x.m = z.m;
  x.k = z.k;
  x.x = z.x;
  x.x_dtype = z.x_dtype;
  x.x_stride = z.x_stride;
  thread_local Scratch scratch;
  prepare_columns(&x, z.k + 1, &scratch, isa, threads);
  for (int64_t m = 0; m < z.m; m += x.tile) std::fill_n(x.prepared + m * x.padded_k + z.k * x.tile, x.tile, 0.0f);
  alignas(64) float values[kPrunedEntries] = {};
  std::copy_n(z.table, int64_t{1} << z.bits, values);
  z.prepared = &x;
  z.values = values;
  const MultiplyPruned multiply = *newest(units::pruned::kAll, isa).given;
  const int64_t products = z.m * z.steps * kPrunedRows;
  parallel(ceil_div(z.m, x.tile) * blocks, products < kLeastOutlierProducts ? 1 : threads,
           [&](int64_t begin, int64_t end) { multiply(z, begin, end); });
  scratch.trim();
}

}  // namespace lowbit
