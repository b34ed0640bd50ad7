// With int8 activations: the table of a weight as int8, and how far sums are exact in int32. Compiled under every
// instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"
#include "core/n16.h"

namespace lowbit {

constexpr int kMaxEntries = 256;

// A segment is summed in parts of at most so many weights, each exactly in int32: 255 * 128 * 65536 < 2^31.
constexpr int64_t kMaxInt8Group = 65536;

// What a group of the weight and a block of x have in common, whose products are summed before they meet a scale. One
// of the two divides the other, unless it ends with the row.
struct Segments {
  int64_t size, count;           // the last may be short
  int64_t parts;                 // of a segment; `x_sums` are (m, count * parts)
  int64_t blocks;                // scales of a row of x
  int32_t per_group, per_block;  // segments of a group, and of a block of x

  // The group of a segment, and the block of x.
  constexpr int64_t group(int64_t segment) const { return of(segment, per_group); }
  constexpr int64_t block(int64_t segment) const { return of(segment, per_block); }

 private:
  static constexpr int64_t of(int64_t segment, int32_t per) {
    return per == 1 ? segment : static_cast<int64_t>(static_cast<uint32_t>(segment) / static_cast<uint32_t>(per));
  }
};
static constexpr Segments segments_of(const Launch& l) {
  const int64_t group = l.group < l.k ? l.group : l.k, block = l.x_group > 0 && l.x_group < l.k ? l.x_group : l.k;
  const int64_t size = block < group ? block : group;
  return {.size = size,
          .count = ceil_div(l.k, size),
          .parts = ceil_div(size, kMaxInt8Group),
          .blocks = ceil_div(l.k, block),
          .per_group = static_cast<int32_t>(ceil_div(group, size)),
          .per_block = static_cast<int32_t>(ceil_div(block, size))};
}
// The fp32 terms of so many parts are summed apart, and then these sums: of thousands, the last would meet a sum that
// is far larger, and round as it does.
constexpr int64_t kSumParts = 128;

// table = step * T, with T = round(table / step) to nearest even in -128 .. 127 and 0 where the table is not finite.
// `step` 0 takes the largest finite |table| / 127, or 1 for a table of zeros. Returns the step.
float round_table(const float* table, int entries, float step, int8_t* out);

}  // namespace lowbit
