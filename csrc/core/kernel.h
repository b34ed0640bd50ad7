// The kernel table's types: what is asked (Desc), one kernel (Kernel), and one call (Launch). No torch, no Python,
// no std containers: this header is compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace lowbit {

enum class Op : int32_t { kLinear, kDequantize };
// kB1: signs of x, eight to a byte from the least significant bit; 1 is +1 and 0 is -1. The first five are those of x.
// Of scales alone: kE4m3, and kE8m0, the power of two 2^(byte - 127), NaN for 255. Of scales with a second level, and
// their zeros: kU4, kU6 and kI6, integers of which the 64 of a block and group are a little-endian bit stream.
enum class Dtype : int32_t { kF32, kBf16, kF16, kI8, kB1, kE4m3, kE8m0, kU4, kU6, kI6 };
constexpr int kDtypes = 5;
// kInt: the table is code + table[0], so arithmetic may replace the lookup.
enum class Codec : int32_t { kLut, kInt, kE4m3, kE5m2 };
// One table for the weight, or one per column (and possibly per group).
enum class Scope : int32_t { kShared, kColumn };
// gelu with erf, as torch's default, and its approximation with tanh.
enum class Activation : int32_t { kNone, kRelu, kSilu, kGelu, kGeluTanh };
enum class ZeroMode : int32_t { kNone, kSubtract, kAdd };

struct Desc {
  Op op;
  Dtype x;  // activations, kI8 also if they are to be quantized; for kDequantize, the output
  Codec codec;
  int32_t bits;
  Scope scope;
  ZeroMode zero;
  int64_t m, n, k;
  int64_t group;  // at least 1; k or more means the whole row
  int32_t threads = 1;
  bool bf16_table = false;  // every table entry is a bf16 number
};

// What follows y = x W^T + bias in fp32, before the one rounding: out = activation(y) + residual, or with a gate
// out = activation(gate) * y + residual. Gate and residual are (m, n), unit stride along n, and may be null.
struct Epilogue {
  Activation activation;
  const void* gate;
  int64_t gate_stride;
  const void* residual;
  int64_t residual_stride;
  Dtype dtype;  // of gate and residual
};

// Bits of an integer that is packed in scales; 0 of other dtypes.
constexpr int packed_scale_bits(Dtype d) { return d == Dtype::kU4 ? 4 : d == Dtype::kU6 || d == Dtype::kI6 ? 6 : 0; }

// W[n, k] = scale * (T - zero) or scale * T + zero, T = table[code]; y = x W^T + bias. Layouts: n16.h; scales and
// zeros are (n / 64, groups, 64), a column table is (n / 64, table_groups, 2^bits, 64), all padded to whole blocks.
// With a second level scale is scales * scales2 in fp32, and the zero of kAdd zeros * zeros2: each is
// (n / 64, num_supers, 64), one number for `super_groups` groups, or, if num_supers is 0, one fp32 for the weight.
struct Launch {
  int64_t m, n, k, group, num_groups;
  const void* x;
  Dtype x_dtype;
  int64_t x_stride;  // elements between rows, bytes for kB1
  void* prepared;    // x in the kernel's compute dtype, rows of prepared_stride, zero beyond k
  int64_t prepared_stride;
  float* x_sums;  // (m, num_groups): sums of x over each group, int32 with int8 x; only where they are needed
  float*
      x_scales;  // of int8 and binary x: (m), or (m, num_groups) if x_group_scales; written by `prepare` if x is float
  bool x_group_scales;
  const uint8_t* codes;
  const void* scales;  // may be null
  Dtype scale_dtype;
  const void* zeros;  // null if zero is kNone
  Dtype zero_dtype;
  ZeroMode zero;
  const void *scales2, *zeros2;  // may be null
  Dtype second_dtype;
  int64_t super_groups, num_supers;
  const float* table;
  int64_t table_groups;
  const int8_t* table_i8;  // with int8 x: table = table_step * table_i8, exactly or rounded (int8_table.h)
  float table_step;
  const void* bias;  // may be null
  Dtype bias_dtype;
  void* out;  // (m, n), or (n, k) for kDequantize
  Dtype out_dtype;
  int64_t out_stride;
  float out_inverse;         // int8 out holds out_inverse * y, rounded to nearest even and saturated
  const Epilogue* epilogue;  // may be null
};

// Picoseconds per weight on one thread: `single` for one row, else fixed + pass * ceil(m / rows_per_pass). The
// constants stand in costs.h with how they were measured.
struct Cost {
  float single, fixed, pass;
  int32_t rows_per_pass;
};

struct Kernel {
  const char* name;  // op_act_codec_layout_isa
  Op op;
  Dtype compute;  // what x is converted to before it meets the weights
  Codec codec;
  int32_t bits;
  Scope scope;
  Isa isa;
  bool chunk_groups;      // groups must be a multiple of `span`, or the whole row; see half_groups
  bool exact_x[kDtypes];  // by Dtype of x: converting to `compute` loses nothing
  Cost cost;
  // Converts rows [begin, end) of x; null for kDequantize.
  void (*prepare)(const Launch&, int64_t begin, int64_t end);
  // A task is a block of 64 columns times a block of rows.
  int64_t rows_per_task;
  void (*run)(const Launch&, int64_t task_begin, int64_t task_end);
  int32_t span = 32;         // prepared rows are padded to a multiple of it
  int32_t terms = 1;         // numbers of `compute` whose sum is an element of x
  bool bf16_table = false;   // only for such tables
  bool half_groups = false;  // groups of half a chunk too
};

}  // namespace lowbit
