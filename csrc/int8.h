// What the int8-activation family shares across instruction sets: the table of a weight as int8, and activations as
// int8. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "layout.h"

namespace lowbit {

constexpr int kMaxEntries = 256;

// A group is summed in parts of at most so many weights, each exactly in int32: 255 * 128 * 65536 < 2^31. A part counts
// as a group whose scale and zero are those of its group; `x_sums` are (m, num_groups * parts).
constexpr int64_t kMaxInt8Group = 65536;
static constexpr int64_t parts_of_group(const Launch& l) {
  return ceil_div(l.group < l.k ? l.group : l.k, kMaxInt8Group);
}
// The fp32 terms of so many parts are summed apart, and then these sums: of thousands, the last would meet a sum that
// is far larger, and round as it does.
constexpr int64_t kSumParts = 128;

// table = step * T, with T = round(table / step) to nearest even in -128 .. 127 and 0 where the table is not finite.
// `step` 0 takes the largest finite |table| / 127, or 1 for a table of zeros. Returns the step.
float round_table(const float* table, int entries, float step, int8_t* out);

struct QuantizeInt8 {
  const void* x;
  Dtype x_dtype;
  int64_t x_stride, k, group;
  float* scales;  // (m, groups), written; or (m), read, if static_scales: NaN is written for a row with NaN
  bool static_scales;
};
// Rows [begin, end) of q (m, k) = x as int8 (cpu/quantize-inl.h).
void quantize_int8_rows(const QuantizeInt8& request, int8_t* q, int64_t begin, int64_t end);
// All rows, on up to `threads` threads.
void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads);

}  // namespace lowbit
