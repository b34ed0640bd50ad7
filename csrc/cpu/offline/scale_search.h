// The scale of every group of weights that leaves the least squared error with a given table, or with the best of some
// tables: candidates of the scale are tried, each is refitted by least squares to the codes that it gives, and the best
// one is kept if it is better than the scale and the table that the group has. All values are finite, importance is not
// negative; the caller checks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/stop.h"

namespace lowbit {

// A group is the next `group` weights of a row, the last one may be short.
struct ScaleSearch {
  const float* weights;     // (rows, k)
  const float* importance;  // (rows, k), or null for 1
  int64_t rows, k, group;
  // What scales there are: `steps` (rows, groups) times integers up to `top` of either sign; or, where it is null,
  // floats of so many binary digits that are multiples of 2^least and at most `most`. None but that of 0 is rounded to
  // 0.
  const float* steps;
  int top;
  int digits, least;
  float most;
  const float* table;  // (tables, entries), each ascending
  int tables, entries;
  const float* ratios;  // (num_ratios): candidates of a scale over the largest weight of importance, of any sign
  int num_ratios;
  float* scales;    // (rows, groups): those at hand, then the best ones
  uint8_t* chosen;  // (rows, groups): numbers of tables, likewise
  double* errors;   // (rows): importance * (weight - scale * nearest entry)^2, summed
};

// The weights of the longest group, up to a whole number of vectors of 16.
static inline int64_t scale_search_padded(const ScaleSearch& s) { return (std::min(s.group, s.k) + 15) / 16 * 16; }

// Rows first, first + step, ...; `scratch` holds twice scale_search_padded floats and `entries` for each table. `asks`
// is for the thread that made `stop`.
using SearchRows = void (*)(const ScaleSearch& s, int64_t first, int64_t step, float* scratch, Stop* stop, bool asks);

// `scales` and `errors` are not to be used if it was stopped.
void search_scales(const ScaleSearch& search, uint32_t isa, int threads, Stop* stop);

}  // namespace lowbit
