// Activations as int8. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

struct QuantizeInt8 {
  const void* x;
  Dtype x_dtype;
  int64_t x_stride, k, group;
  float* scales;  // (m, groups), written; or (m), read, if static_scales: NaN is written for a row with NaN
  bool static_scales;
};
// Rows [begin, end) of q (m, k) = x as int8 (quantize-inl.h).
void quantize_int8_rows(const QuantizeInt8& request, int8_t* q, int64_t begin, int64_t end);
// All rows, on up to `threads` threads.
void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads);

}  // namespace lowbit
