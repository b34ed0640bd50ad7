#include "cpu/structured/structured.h"

#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(structured)

namespace {

// Weights below which one thread is faster.
constexpr int64_t kLeastWeights = 1 << 14;

}  // namespace

const char* structured_isa(uint32_t isa_mask) { return isa_name(newest(units::structured::kAll, isa_mask).isa); }

void structured_rows(const StructuredRows& r, uint32_t isa, int threads) {
  const StructuredKernel& kernel = *newest(units::structured::kAll, isa).given;
  parallel(r.count, r.count * r.w.k < kLeastWeights ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.rows(r, begin, end); });
}

void structured_linear(StructuredLinear l, uint32_t isa, int threads) {
  if (l.m == 0 || l.w.n == 0) return;
  const StructuredKernel& kernel = *newest(units::structured::kAll, isa).given;
  l.padded_k = ceil_div(l.w.k, kStructuredChunk) * kStructuredChunk;
  thread_local Scratch scratch;
  l.prepared = static_cast<float*>(scratch.get(static_cast<size_t>(l.m * l.padded_k) * sizeof(float)));
  kernel.prepare(l);
  parallel(ceil_div(l.w.n, kStructuredTile), l.w.n * l.w.k < kLeastWeights ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.linear(l, begin, end); });
  scratch.trim();
}

}  // namespace lowbit
