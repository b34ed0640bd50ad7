#include "cpu/sparse/outliers.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "core/costs.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(outliers)

const char* outliers_isa(uint32_t isa_mask) { return isa_name(newest(units::outliers::kAll, isa_mask).isa); }

void prepare_columns(Outliers* z, int64_t columns, Scratch* scratch, uint32_t isa, int threads) {
  const OutlierKernel& kernel = *newest(units::outliers::kAll, isa).given;
  z->tile = z->m < kLeastOutlierTileRows ? 1 : kOutlierTile;
  z->padded_k = ceil_div(columns, kOutlierTile) * kOutlierTile;
  const int64_t tiles = ceil_div(z->m, z->tile), elements = tiles * z->tile * z->padded_k;
  z->prepared = static_cast<float*>(scratch->get(static_cast<size_t>(elements) * sizeof(float)));
  parallel(tiles * ceil_div(z->k, kOutlierDepth), elements < kLeastConversions ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.prepare(*z, begin, end); });
}

void multiply_outliers(Outliers z, uint32_t isa, int threads) {
  if (z.m == 0 || z.n == 0) return;
  const OutlierKernel& kernel = *newest(units::outliers::kAll, isa).given;
  thread_local Scratch scratch;
  prepare_columns(&z, z.k, &scratch, isa, threads);
  const int64_t tiles = ceil_div(z.m, z.tile);
  std::atomic<uint32_t> largest{0};
  parallel(tiles * ceil_div(z.n, kOutlierRows), z.m * z.n * z.count < kLeastOutlierProducts ? 1 : threads,
           [&](int64_t begin, int64_t end) {
             const uint32_t found = kernel.run(z, begin, end);
             uint32_t before = largest.load();
             while (before < found && !largest.compare_exchange_weak(before, found)) {
             }
           });
  scratch.trim();
  if (largest < z.k) return;
  throw std::invalid_argument("outlier_columns must be in [0, " + std::to_string(z.k) + "), got " +
                              std::to_string(static_cast<int32_t>(largest.load())));
}

}  // namespace lowbit
