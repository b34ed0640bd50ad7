// An FP8 product on the device: y = (a * scale_a) (b * scale_b)^T + bias. No torch, no Python.
#pragma once

#include "launch.h"

namespace lowbit::cuda {

// Elements of an operand that share a scale.
enum class Scales : int32_t { kTensor, kRow, kBlock1x128, kBlock128x128 };

struct Fp8Operand {
  const void* data;  // rows of `stride` bytes, both multiples of 16
  int64_t rows, stride;
  bool e5m2;
  const float* scales;  // contiguous
  Scales kind;
};

struct Fp8Product {
  Fp8Operand p, q;  // P is multiplied by 64 rows of a warpgroup, Q by up to 128 columns
  int64_t k;
  bool transposed;   // P is b: y has rows of Q
  const void* bias;  // of the columns of y, may be null
  Type bias_type;
  void* out;  // contiguous
  Type out_type;
};

// Where the scale of a row at block `block` of K (of `blocks`) stands; rows beyond the operand have that of its last.
LOWBIT_HD constexpr int64_t scale_index(Scales kind, int64_t rows, int64_t row, int block, int blocks) {
  if (row >= rows) row = rows - 1;
  if (kind == Scales::kTensor) return 0;
  if (kind == Scales::kRow) return row;
  return (kind == Scales::kBlock1x128 ? row : row / 128) * blocks + block;
}

LOWBIT_HD constexpr bool by_block(Scales s) { return s == Scales::kBlock1x128 || s == Scales::kBlock128x128; }

// Scales that the kernel applies to the sums of every block of K: none, those of rows of P and one for all rows of Q in
// a tile, or those of rows of P and of Q.
enum class BlockScales : int32_t { kNone, kRows, kRowsAndColumns };
LOWBIT_HD constexpr BlockScales block_scales(Scales p, Scales q) {
  if (q == Scales::kBlock1x128) return BlockScales::kRowsAndColumns;
  return by_block(p) || by_block(q) ? BlockScales::kRows : BlockScales::kNone;
}

// Whether P is b, and rows of Q in a block.
struct Fp8Config {
  bool transposed;
  int32_t cols;
};

// Few rows of a waste least as the columns of a block. Else P is the operand whose rows have scales of their own along
// K: each thread has two rows of P and many columns, fewer where those have such scales, too.
constexpr Fp8Config choose_fp8(int64_t m, Scales a, Scales b) {
  if (m <= 64) return {true, m <= 16 ? 16 : 64};
  const bool transposed = b == Scales::kBlock1x128 && a != Scales::kBlock1x128;
  return {transposed, (transposed ? a : b) == Scales::kBlock1x128 ? 64 : 128};
}

}  // namespace lowbit::cuda
