// Trits to codes of 2 bits, for all kernels that read these: the compiler makes vectors of the bytes.
#pragma once

#include "core/kernel.h"
#include "core/trits.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

void expand_trits(const uint8_t* trits, int64_t k, uint8_t* codes) {
  const int64_t chunks = num_chunks(k), stride = chunk_bytes(kTritBits);
  int64_t c = 0;
  for (; c + kTritChunks <= chunks; c += kTritChunks) {
    for (int v = 0; v < kBlockN / kUnitLanes; ++v) {
      trits::expand_span<kUnitBytes>(trits, codes + c * stride + v * vector_bytes(kTritBits), stride);
      trits += vector_bytes(kTritUnits);
    }
  }
  __builtin_memcpy(codes + c * stride, trits, (chunks - c) * stride);
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
