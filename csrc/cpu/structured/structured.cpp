#include "cpu/structured/structured.h"

#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "core/scratch.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(structured)
LOWBIT_REGISTRY(blocks)

namespace {

// Weights below which one thread is faster.
constexpr int64_t kLeastWeights = 1 << 14;

const Unit<StructuredKernel>& unit_of(StructuredCodec codec, uint32_t isa_mask) {
  if (codec >= StructuredCodec::kIq1S) return newest(units::blocks::kAll, isa_mask);
  return newest(units::structured::kAll, isa_mask);
}

}  // namespace

const char* structured_isa(StructuredCodec codec, uint32_t isa_mask) { return isa_name(unit_of(codec, isa_mask).isa); }

void structured_rows(const StructuredRows& r, uint32_t isa, int threads) {
  const StructuredKernel& kernel = *unit_of(r.w.codec, isa).given;
  parallel(r.count, r.count * r.w.k < kLeastWeights ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.rows(r, begin, end); });
}

void structured_linear(StructuredLinear l, uint32_t isa, int threads) {
  if (l.m == 0 || l.w.n == 0) return;
  const StructuredKernel& kernel = *unit_of(l.w.codec, isa).given;
  l.padded_k = ceil_div(l.w.k, kStructuredChunk) * kStructuredChunk;
  thread_local Scratch scratch;
  l.prepared = static_cast<float*>(scratch.get(static_cast<size_t>(l.m * l.padded_k) * sizeof(float)));
  kernel.prepare(l);
  parallel(ceil_div(l.w.n, kStructuredTile), l.w.n * l.w.k < kLeastWeights ? 1 : threads,
           [&](int64_t begin, int64_t end) { kernel.linear(l, begin, end); });
  scratch.trim();
}

}  // namespace lowbit
