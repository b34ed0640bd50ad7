// What a decoder computes between its linears: one table of functions per instruction set. No torch, no std containers.
//
// Rows of activations are padded to whole kRowAlign elements; the padding holds zeros and stays zero. Every function
// rounds to the activations' dtype where a transformer of that dtype does, and computes in fp32 between.
#pragma once

#include "kernel.h"

namespace lowbit {

constexpr int64_t kRowAlign = 16;
constexpr int64_t kKeyBlock = 64;  // positions that attention takes at a time; caches hold whole blocks

// The cache of one key head, fp32 or bf16. Positions of keys lie in the lanes, dimensions of values do, and for bf16
// two neighbours of what is summed over share a dword:
//     keys:    fp32 [position / 16][dim][16],      bf16 [position / 16][dim / 2][16][2]
//     values:  fp32 [position][padded_dim],        bf16 [position / 2][padded_dim][2]
struct HeadCache {
  void* keys;
  void* values;
  Dtype dtype;
  int64_t dim;         // even
  int64_t padded_dim;  // to kRowAlign
};

// softmax(scale q k) v of `rows` queries over the positions [begin, end), not yet divided by the sum. Row r sees the
// positions below first_limit + r / group, of which there is at least one in the range.
struct Attend {
  HeadCache cache;
  const float* q;  // (rows, padded_dim)
  int64_t rows, group, first_limit, begin, end;
  float scale;
  float* scratch;  // (rows, padded_dim)
  float* acc;      // (rows, padded_dim)
  float* max;      // (rows)
  float* sum;      // (rows)
};

// Partial results of one query over disjoint ranges of positions.
struct Partial {
  const float* acc;
  float max, sum;
};

struct DecoderOps {
  // x += y, which may be null; out = x / rms(x) * weight. All (n).
  void (*add_norm)(Dtype dtype, void* x, const void* y, const void* weight, float eps, int64_t n, void* out);
  // Rotary embedding of one head: out = x cos + (x with its halves swapped) sin, where the first half of sin is
  // negated. cos, sin and out are (padded_dim); x is (dim), not padded. scratch: 2 padded_dim.
  void (*rotate)(Dtype dtype, const void* x, const float* cos, const float* sin, int64_t dim, float* scratch,
                 float* out);
  // Stores a rotated key and a value (dim) in `dtype` at a position. If it is the `last` one so far, its neighbour in a
  // pair becomes zero, so that a sum over pairs meets no stale value.
  void (*store_position)(const HeadCache& cache, int64_t position, bool last, const float* key, Dtype dtype,
                         const void* value, float* scratch);
  void (*attend)(const Attend& a);
  // out (n) = the merged and divided result of some parts.
  void (*finish)(const Partial* parts, int count, int64_t n, Dtype dtype, void* out);
  // gate = silu(gate) up, (n).
  void (*silu_mul)(Dtype dtype, void* gate, const void* up, int64_t n);
  // out[begin, end) = (x W^T + bias)[begin, end) for a dense weight (.., k) in `dtype`; bias may be null.
  void (*dense)(Dtype dtype, const void* weight, const void* bias, const void* x, int64_t k, int64_t begin, int64_t end,
                void* out);
  // The index of the first largest value; NaN is never the largest.
  int64_t (*argmax)(Dtype dtype, const void* x, int64_t n);
};

}  // namespace lowbit
