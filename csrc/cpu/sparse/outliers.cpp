#include "cpu/sparse/outliers.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "core/n16.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace lowbit {

OutlierKernel outliers_scalar();
OutlierKernel outliers_avx2();
OutlierKernel outliers_avx512();

namespace {

// A row of x takes 0.4 ns for each entry by itself and a tile of 16 takes 1.6 (AVX2, x in L1 and L2).
constexpr int64_t kLeastRowsOfTile = 5;
// Below this many products, and this many elements of x, a second thread costs more than it saves.
constexpr int64_t kLeastProducts = 32 * 1024;
constexpr int64_t kLeastElements = 64 * 1024;

}  // namespace

void multiply_outliers(Outliers z, uint32_t isa, int threads) {
  if (z.m == 0 || z.n == 0) return;
  const OutlierKernel kernel = isa & kAvx512 ? outliers_avx512() : isa & kAvx2 ? outliers_avx2() : outliers_scalar();
  z.tile = z.m < kLeastRowsOfTile ? 1 : kOutlierTile;
  z.padded_k = ceil_div(z.k, kOutlierTile) * kOutlierTile;
  const int64_t tiles = ceil_div(z.m, z.tile), elements = tiles * z.tile * z.padded_k;
  thread_local Scratch scratch;
  z.prepared = static_cast<float*>(scratch.get(static_cast<size_t>(elements) * sizeof(float)));
  parallel(tiles * ceil_div(z.k, kOutlierDepth), elements < kLeastElements ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.prepare(z, begin, end); });
  std::atomic<uint32_t> largest{0};
  parallel(tiles * ceil_div(z.n, kOutlierRows), z.m * z.n * z.count < kLeastProducts ? 1 : threads,
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
