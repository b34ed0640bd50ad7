// What the int8-activation family shares across instruction sets: the table of a weight as int8, and activations as
// int8. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace lowbit {

constexpr int kMaxEntries = 256;

// table = step * T, with T = round(table / step) to nearest even in -128 .. 127 and 0 where the table is not finite.
// `step` 0 takes the largest finite |table| / 127, or 1 for a table of zeros. Returns the step.
float round_table(const float* table, int entries, float step, int8_t* out);

struct QuantizeInt8 {
  const void* x;
  Dtype x_dtype;
  int64_t x_stride, k, group;
  float* scales;  // (m, groups), written; or (m), read, if static_scales
  bool static_scales;
};
// q (m, k) = x as int8 by rows, on up to `threads` threads (cpu/quantize-inl.h).
void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads);

}  // namespace lowbit
