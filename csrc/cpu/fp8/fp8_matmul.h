// Products of two FP8 matrices with scales: y = (a * sa) (b * sb)^T + bias, sums in fp32. Scales multiply the sum of a
// group of products, (sum * sa) * sb, and are never rounded. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>
#include <span>

#include "core/kernel.h"
#include "cpu/fp8/fp8.h"

namespace lowbit {

// The scale of element (row, k) is values[(row >> row_shift) * stride + (k >> k_shift)]. Groups along K are of 16, 32
// or 128 values, or the whole row (kWholeRow).
struct Fp8Scales {
  const void* values;
  ScaleType type;
  int32_t row_shift, k_shift;
  int64_t stride;
};
constexpr int32_t kWholeRow = 63;

struct Fp8Operand {
  const uint8_t* codes;
  int64_t stride;  // bytes between rows
  Float8 type;
  Fp8Scales scales;
};

struct Fp8Matmul {
  Launch out;       // m, n, k, bias and out; no epilogue, not int8
  Fp8Operand a, b;  // (m, k), (n, k)
  void* prepared;   // rows of a as `run` reads them
  float* a_scales;  // as `run` reads them
};

// What an instruction set gives. A task of `run` is a block of columns times a block of rows.
struct Fp8MatmulKernel {
  const char* name;
  Isa isa;
  Dtype compute;          // of the products
  int64_t element_bytes;  // of prepared a
  int64_t columns;        // of a task of many rows
  void (*prepare)(const Fp8Matmul&, int64_t begin, int64_t end);
  void (*run)(const Fp8Matmul&, int64_t task_begin, int64_t task_end);
};
// Up to this many rows, products run along K and read each row of b once; more rows share a decoded panel of b.
constexpr int64_t kFp8FewRows = 4;
constexpr int64_t kFp8FewRowsColumns = 16;  // columns of a task of few rows
constexpr int64_t kFp8RowsPerTask = 516;    // of many rows
constexpr int64_t kFp8PadK = 64;            // prepared rows are zero up to a multiple of it

// Those of all instruction sets, the newest first.
std::span<const Fp8MatmulKernel* const> fp8_matmul_kernels();
// The newest in a mask.
const Fp8MatmulKernel& fp8_matmul_kernel(uint32_t isa_mask);
// Sets `prepared` and `a_scales`. On up to `threads` threads.
void fp8_matmul(const Fp8MatmulKernel& kernel, Fp8Matmul request, int threads);

}  // namespace lowbit
