// FP8 quantization: casts, maxima of blocks, quantize and dequantize. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

enum class Float8 : int32_t { kE4m3, kE5m2 };
enum class ScaleType : int32_t { kF32, kBf16, kE8m0 };

// A (rows, k) matrix of floats in blocks of block_rows x block_k; the block of (row, column) is number
// row / block_rows * row_blocks + column / block_k. With row_blocks 0 all rows share the blocks of the first.
struct Fp8Blocks {
  int64_t rows, k;
  int64_t block_rows, block_k, row_blocks;
};

struct Fp8Source {
  const void* x;
  Dtype dtype;
  int64_t stride;  // elements between rows
};

struct Fp8Quantize {
  Fp8Blocks blocks;
  Fp8Source x;
  Float8 type;
  ScaleType scale_type;
  const float* maxima;  // of every block, or null: found here, which takes block_rows of 1 or whole bands of rows
  void* scales;         // written
  uint8_t* q;           // (rows, k)
  bool stochastic;
  uint64_t seed;
};

struct Fp8Dequantize {
  Fp8Blocks blocks;
  const uint8_t* q;
  Float8 type;
  const void* scales;
  ScaleType scale_type;
  void* out;  // (rows, k)
  Dtype out_dtype;
};

// Rows [row, row_end) and columns [column, column_end), whole blocks or parts of one.
struct Fp8Region {
  int64_t row, row_end, column, column_end;
};

// What every instruction set has (fp8_quantize-inl.h).
struct Fp8Ops {
  // The largest |x| of the region, NaN if there is one.
  float (*largest)(const Fp8Source&, const Fp8Region&);
  // Maxima of every block of the region, which holds whole blocks.
  void (*maxima)(const Fp8Blocks&, const Fp8Source&, const Fp8Region&, float* out);
  void (*quantize)(const Fp8Quantize&, const Fp8Region&);
  void (*dequantize)(const Fp8Dequantize&, const Fp8Region&);
  // q = x to nearest even; beyond the largest value that, or infinity (E5M2) or NaN (E4M3) without `saturate`.
  void (*cast)(const Fp8Source&, Float8 type, bool saturate, const Fp8Region&, uint8_t* q);
};
// Those of the newest instruction set in a mask.
const Fp8Ops& fp8_ops(uint32_t isa_mask);

// On up to `threads` threads.
void fp8_maxima(const Fp8Ops& ops, const Fp8Blocks& blocks, const Fp8Source& x, float* maxima, int threads);
// `transposed`: q^T (k, rows), or null.
void fp8_quantize(const Fp8Ops& ops, const Fp8Quantize& request, uint8_t* transposed, int threads);
void fp8_dequantize(const Fp8Ops& ops, const Fp8Dequantize& request, int threads);
void fp8_cast(const Fp8Ops& ops, const void* x, Dtype dtype, int64_t count, Float8 type, bool saturate, uint8_t* q,
              int threads);

}  // namespace lowbit
