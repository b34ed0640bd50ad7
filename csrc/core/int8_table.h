// With int8 activations: the table of a weight as int8, and how far sums are exact in int32. Compiled under every
// instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"
#include "core/n16.h"

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

}  // namespace lowbit
