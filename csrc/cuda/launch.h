// What a call of a CUDA kernel is given: host and device, no torch, no Python.
#pragma once

#include <cstdint>

#include "m16.h"

namespace lowbit::cuda {

enum class Type : int32_t { kF32, kBf16, kF16, kI8 };
LOWBIT_HD constexpr int type_bytes(Type t) { return t == Type::kF32 ? 4 : t == Type::kI8 ? 1 : 2; }
// W = scale * (T - zero) with integers (kInt) or floats (kSubtract), or scale * T + zero (kAdd).
enum class Zero : int32_t { kNone, kInt, kSubtract, kAdd };

// y = x W^T + bias. Operands lie as m16.h says, on the device.
struct Linear {
  int64_t m, n, k, group, num_groups;
  int32_t bits;
  Type type;      // of x and of the table where it meets x; kBf16 or kF16
  const void* x;  // 16-byte aligned rows of x_stride elements, a multiple of 8, with zeros to the next multiple of 64
  int64_t x_stride;
  const uint32_t* codes;
  const void* scales;  // null: 1
  Type scale_type;
  const void* zeros;  // null with Zero::kNone
  Type zero_type;
  Zero zero;
  const float* table;   // (2^bits,)
  const float* x_sums;  // (num_groups, m): sums of x over each group; only for Zero::kSubtract and kAdd
  const void* bias;     // may be null
  Type bias_type;
  void* out;  // (m, n) contiguous
  Type out_type;
  float* parts;  // (splits, m, n) if K is split
};

// scale * (T - zero) in fp32, rounded once: rows of the weight, all of them or those that `indices` names.
struct Dequantize {
  int64_t rows, n, k, group, num_groups;
  int32_t bits;
  const int64_t* indices;  // (rows,) or null
  const uint32_t* codes;
  const void* scales;
  Type scale_type;
  const void* zeros;
  Type zero_type;
  Zero zero;
  const float* table;
  void* out;  // (rows, k)
  Type out_type;
};

// Which kernel computes a product (heuristics.h).
enum class Family : int32_t { kMma, kWgmma, kDecode };
struct Config {
  Family family;
  int32_t tiles_m;           // x tiles of 8 rows that a block takes
  int32_t splits;            // parts of K
  int64_t stages_per_split;  // of MmaTile; tiles of 64 weights for kWgmma
  int32_t shared;            // bytes of dynamic shared memory
  int32_t depth;             // kMma: stages in the ring
  bool bulk;                 // kMma: a warp of its own fills it, as the code for sm_90 and later does
};

}  // namespace lowbit::cuda
