// What a decoder computes between its linears: one table of functions per instruction set. No torch, no std containers.
//
// Rows of activations are padded to whole kRowAlign elements; the padding holds zeros and stays zero. Every function
// rounds to the activations' dtype where a transformer of that dtype does, and computes in fp32 between.
#pragma once

#include "core/kernel.h"

namespace lowbit {

constexpr int64_t kRowAlign = 16;
constexpr int64_t kKeyGroup = 32;  // dimensions of an int8 key with a scale of their own
constexpr int64_t kKeyBlock = 64;  // positions that attention takes at a time; caches hold whole blocks

constexpr bool has_scales(Dtype cache) { return cache == Dtype::kI8 || cache == Dtype::kE4m3; }
// Dimensions of a key that share a scale.
constexpr int64_t key_group(Dtype cache, int64_t dim) { return cache == Dtype::kI8 ? kKeyGroup : dim; }

// The cache of one key head. Positions of keys lie in the lanes, dimensions of values do, and for bf16 two neighbours
// of what is summed over share a dword:
//     keys:    [position / 16][dim][16],  bf16 [position / 16][dim / 2][16][2]
//     values:  [position][padded_dim],    bf16 [position / 2][padded_dim][2]
// int8: codes times absmax / 127 of the value, or of 32 dimensions of the key: a few of a key's are far above the
// others. E4M3: codes times absmax / 448 of the value, or of the key; the scales hold 256 times that, what the codes as
// fp16 are to be multiplied by.
struct HeadCache {
  void* keys;
  void* values;
  float *key_scales, *value_scales;  // int8 and E4M3 only: (groups of dimensions, length) and (length)
  int64_t length;                    // positions that the cache holds
  Dtype dtype;                       // kF32, kBf16, kF16, kI8 or kE4m3
  int64_t dim;                       // even
  int64_t padded_dim;                // to kRowAlign
};

// softmax(s) v of `rows` queries over the positions [begin, end), not yet divided by the sum, for s = scale q k or
// cap tanh(scale q k / cap). Row r sees the last `window` positions below first_limit + r / group, of which there is at
// least one in the range. begin is a multiple of kKeyBlock.
struct Attend {
  HeadCache cache;
  const float* q;  // (rows, padded_dim), the values of q_dtype
  Dtype q_dtype;
  int64_t rows, group, first_limit, window, begin, end;
  float scale, cap;  // cap 0: none
  float* scratch;    // (rows, padded_dim)
  float* acc;        // (rows, padded_dim)
  float* max;        // (rows)
  float* sum;        // (rows)
};

// Partial results of one query over disjoint ranges of positions.
struct Partial {
  const float* acc;
  float max, sum;
};

// x / rms(x) * weight, of `dtype`. `late`: rounded once, behind the weight; else in front of it, too.
struct Norm {
  Dtype dtype;
  float eps;
  bool late;
};

// What stands between two linears: x += y_scale y, or y_scale norm(y), then out = norm(x). All (n).
struct AddNorm {
  Norm norm;
  int64_t n;
  float y_scale;
  void* x;
  const void* y;        // may be null
  const float* y_norm;  // the weight of the norm of y, or null
  const float* weight;
  void* out;
};

// A head of a query or a key, made ready for attention: its norm, if it has a weight, then the rotary embedding of the
// first `rotary` dimensions: x cos + (x with its halves swapped) sin, where the first half of sin is negated.
struct Head {
  Norm norm;
  int64_t dim, rotary;  // rotary: even
  const void* x;        // (dim), not padded
  const float* weight;  // (padded_dim), or null
  const float* cos;     // rotary dimensions padded to kRowAlign with 1
  const float* sin;     // with 0
  float* scratch;       // (padded_dim)
  float* out;           // (padded_dim)
};

struct DecoderOps {
  void (*add_norm)(const AddNorm& a);
  void (*ready)(const Head& h);
  // Stores a rotated key and a value (dim) in `dtype` at a position. If it is the `last` one so far, its neighbour in a
  // pair becomes zero, so that a sum over pairs meets no stale value. scratch: 2 padded_dim.
  void (*store_position)(const HeadCache& cache, int64_t position, bool last, const float* key, Dtype dtype,
                         const void* value, float* scratch);
  void (*attend)(const Attend& a);
  // out (n) = the merged and divided result of some parts.
  void (*finish)(const Partial* parts, int count, int64_t n, Dtype dtype, void* out);
  // gate = activation(gate) up, (n).
  void (*gate_mul)(Activation activation, Dtype dtype, void* gate, const void* up, int64_t n);
  // x *= factor, (n).
  void (*scale)(Dtype dtype, void* x, float factor, int64_t n);
  // x[begin, end) /= divisor, then cap tanh(x / cap) unless cap is 0. begin is a multiple of kRowAlign.
  void (*cap_logits)(Dtype dtype, void* x, float divisor, float cap, int64_t begin, int64_t end);
  // out[begin, end) = (x W^T + bias)[begin, end) for a dense weight (.., k) in `dtype`; bias may be null.
  void (*dense)(Dtype dtype, const void* weight, const void* bias, const void* x, int64_t k, int64_t begin, int64_t end,
                void* out);
  // The index of the first largest value; NaN is never the largest.
  int64_t (*argmax)(Dtype dtype, const void* x, int64_t n);
};

}  // namespace lowbit
