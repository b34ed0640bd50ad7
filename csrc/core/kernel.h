// The kernel table's types: what is asked (Request), one kernel (Kernel), and one call (Launch). No torch, no Python,
// no std containers: this header is compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace lowbit {

enum class Op : int32_t { kLinear, kDequantize };
// kB1: signs of x, eight to a byte from the least significant bit; 1 is +1 and 0 is -1. The first five are those of x.
// Of scales alone: kE4m3, and kE8m0, the power of two 2^(byte - 127), NaN for 255, and kDq8, see Launch. Of scales with
// a second level, and their zeros: kU4, kU6 and kI6, integers of which the 64 of a block and group are a little-endian
// bit stream; and kI7, a byte that holds twice a signed integer plus the number of a table, see Scope.
enum class Dtype : int32_t { kF32, kBf16, kF16, kI8, kB1, kE4m3, kE8m0, kU4, kU6, kI6, kDq8, kI7 };
constexpr int kDtypes = 5;
// kInt: the table is code + table[0], so arithmetic may replace the lookup.
enum class Codec : int32_t { kLut, kInt, kE4m3, kE5m2 };
// One table for the weight, one per column (and possibly per group), or a pair of them for the weight, of which the
// lowest bit of the scale of every group, a kI7, chooses one.
enum class Scope : int32_t { kShared, kColumn, kPair };
// gelu with erf, as torch's default, and its approximation with tanh.
enum class Activation : int32_t { kNone, kRelu, kSilu, kGelu, kGeluTanh };
enum class ZeroMode : int32_t { kNone, kSubtract, kAdd };

struct Request {
  Op op = Op::kLinear;
  Dtype x = Dtype::kF32;  // activations, kI8 also if they are to be quantized; for kDequantize, the output
  Codec codec = Codec::kLut;
  int32_t bits = 0;
  Scope scope = Scope::kShared;
  ZeroMode zero = ZeroMode::kNone;
  int64_t m = 0, n = 0, k = 0;
  int64_t group = 1;  // at least 1; k or more means the whole row. With int8 x, of a segment (int8_table.h)
  int32_t threads = 1;
  bool bf16_table = false;  // every table entry is a bf16 number
};

// What follows y = x W^T + bias in fp32, before the one rounding: out = activation(y) + residual, or with a gate
// out = activation(gate) * y + residual. Gate and residual are (m, n), unit stride along n, and may be null.
struct Epilogue {
  Activation activation = Activation::kNone;
  const void* gate = nullptr;
  int64_t gate_stride = 0;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  Dtype dtype = Dtype::kF32;  // of gate and residual
};

// Bits of an integer that is packed in scales; 0 of other dtypes.
constexpr int packed_scale_bits(Dtype d) { return d == Dtype::kU4 ? 4 : d == Dtype::kU6 || d == Dtype::kI6 ? 6 : 0; }

// 2^8 scales of kDq8 share a factor (QLoRA, arXiv 2305.14314).
constexpr int kFactorBits = 8;

// W[n, k] = scale * (T - zero) or scale * T + zero, T = table[code]; y = x W^T + bias. Layouts: n16.h; scales and
// zeros are (n / 64, groups, 64), a column table is (n / 64, table_groups, 2^bits, 64), all padded to whole blocks; a
// pair of tables is (2, 2^bits).
// With a second level scale is scales * scales2 in fp32, and the zero of kAdd zeros * zeros2: each is
// (n / 64, num_supers, 64), one number for `super_groups` groups, or, if num_supers is 0, one fp32 for the weight.
// Scales of kDq8 are scale_map[code] * factor + offset in fp32, each operation rounded; scales2 is num_supers fp32
// factors, that of row n and group g with index (n * num_groups + g) >> kFactorBits, and the offset.
struct Launch {
  int64_t m = 0, n = 0, k = 0, group = 1, num_groups = 0;
  const void* x = nullptr;
  Dtype x_dtype = Dtype::kF32;
  int64_t x_stride = 0;      // elements between rows, bytes for kB1
  void* prepared = nullptr;  // x in the kernel's compute dtype, rows of prepared_stride, zero beyond k
  int64_t prepared_stride = 0;
  // Sums of x, only where they are needed: (m, num_groups) over each group, or int32 with int8 x (int8_table.h).
  float* x_sums = nullptr;
  // Of int8 and binary x: (m), or of int8 x (m, ceil(k / x_group)), for every x_group weights along k, if that is not
  // 0; written by `prepare` if x is float.
  float* x_scales = nullptr;
  int64_t x_group = 0;
  const uint8_t* codes = nullptr;
  bool trits = false;            // codes are as trits.h says; those that kernels read are of 2 bits
  const void* scales = nullptr;  // may be null
  Dtype scale_dtype = Dtype::kF32;
  const void* zeros = nullptr;  // null if zero is kNone
  Dtype zero_dtype = Dtype::kF32;
  ZeroMode zero = ZeroMode::kNone;
  const void *scales2 = nullptr, *zeros2 = nullptr;  // may be null
  Dtype second_dtype = Dtype::kF32;
  int64_t super_groups = 0, num_supers = 0;
  const float* scale_map = nullptr;  // of the 256 codes of kDq8
  const float* table = nullptr;
  int64_t table_groups = 1;
  const int8_t* table_i8 = nullptr;  // with int8 x: table = table_step * table_i8, exactly or rounded (int8_table.h)
  float table_step = 0;
  const void* bias = nullptr;  // may be null
  Dtype bias_dtype = Dtype::kF32;
  void* out = nullptr;  // (m, n), or (n, k) for kDequantize
  Dtype out_dtype = Dtype::kF32;
  int64_t out_stride = 0;
  float out_inverse = 1;               // int8 out holds out_inverse * y, rounded to nearest even and saturated
  const Epilogue* epilogue = nullptr;  // may be null
};

// What a kernel takes on one thread, in picoseconds per weight: by the number of rows of x, without the ends of groups,
// and `end` / group more for each row. A kernel that was not measured has zeros.
struct Cost {
  static constexpr int kPoints = 8;  // 1, 2, 4, ... 128 rows
  float rows[kPoints] = {};
  float single_end = 0, row_end = 0;  // of one row, and of each of many
  double picoseconds(int64_t m, int64_t group) const;
};

// Types of x, by Dtype.
struct Inputs {
  bool f32 = false, bf16 = false, f16 = false, i8 = false, b1 = false;
  constexpr bool operator[](Dtype dtype) const {
    const bool by_dtype[kDtypes] = {f32, bf16, f16, i8, b1};
    return by_dtype[static_cast<int>(dtype)];
  }
};
constexpr Inputs kFloatInputs{.f32 = true, .bf16 = true, .f16 = true};

struct Kernel {
  const char* name = nullptr;  // op_act_codec_layout_isa
  Op op = Op::kLinear;
  Dtype compute = Dtype::kF32;  // what x is converted to before it meets the weights
  Codec codec = Codec::kLut;
  int32_t bits = 0;
  Scope scope = Scope::kShared;
  Isa isa = kScalar;
  bool chunk_groups = false;  // groups must be a multiple of `span`, or the whole row; see half_groups
  Inputs exact_x = {};        // converting x to `compute` loses nothing
  Cost cost = {};             // filled in by kernels(), from core/costs/
  // Converts rows [begin, end) of x; null for kDequantize.
  void (*prepare)(const Launch&, int64_t begin, int64_t end) = nullptr;
  // A task is a block of 64 columns times a block of rows; 0: times all rows.
  int64_t rows_per_task = 0;
  void (*run)(const Launch&, int64_t task_begin, int64_t task_end) = nullptr;
  int32_t span = 32;         // prepared rows are padded to a multiple of it
  int32_t terms = 1;         // numbers of `compute` whose sum is an element of x
  bool bf16_table = false;   // only for such tables
  bool half_groups = false;  // groups of half a chunk too
};

// The kernels of a unit.
struct KernelTable {
  const Kernel* kernels;
  int32_t count;
};
template <int kCount>
consteval KernelTable table_of(const Kernel (&kernels)[kCount]) {
  return {kernels, kCount};
}

// Codes of 2 bits of a block of 64 columns, from trits (trits.h).
using ExpandTrits = void (*)(const uint8_t* trits, int64_t k, uint8_t* codes);

// out[row begin..end) = W[indices[row]]; `codes` is scratch for k codes.
using EmbedRows = void (*)(const Launch& l, int bits, Scope scope, const int64_t* indices, int64_t begin, int64_t end,
                           uint8_t* codes);

}  // namespace lowbit
