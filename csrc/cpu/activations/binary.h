// Binary activations: signs and one scale for a row. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

struct QuantizeBinary {
  const void* x;
  Dtype x_dtype;
  int64_t x_stride, k;
  float* scales;  // (m): the mean of |x|
};
// bits (m, ceil(k / 8)) = x >= 0 by rows as Dtype::kB1, on up to `threads` threads (xnor-inl.h).
void quantize_binary(const QuantizeBinary& request, int64_t m, uint8_t* bits, int threads);

}  // namespace lowbit
