// Quantization of activations: int8, and binary with signs and one scale for a row. Compiled under every instruction
// set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

struct QuantizeInt8 {
  const void* x = nullptr;
  Dtype x_dtype = Dtype::kF32;
  int64_t x_stride = 0, k = 0, group = 1;
  float* scales = nullptr;  // (m, groups), written; or (m), read, if static_scales: NaN is written for a row with NaN
  bool static_scales = false;
};
struct QuantizeBinary {
  const void* x = nullptr;
  Dtype x_dtype = Dtype::kF32;
  int64_t x_stride = 0, k = 0;
  float* scales = nullptr;  // (m): the mean of |x|
};

// What every instruction set has (quantize_ops-inl.h), for rows [begin, end).
struct QuantizeOps {
  // q (m, k) = x as int8.
  void (*int8)(const QuantizeInt8& request, int8_t* q, int64_t begin, int64_t end);
  // bits (m, ceil(k / 8)) = x >= 0 by rows as Dtype::kB1.
  void (*binary)(const QuantizeBinary& request, uint8_t* bits, int64_t begin, int64_t end);
};
// Those of the newest instruction set in a mask.
const QuantizeOps& quantize_ops(uint32_t isa_mask);

// All rows, on up to `threads` threads.
void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads);
void quantize_binary(const QuantizeBinary& request, int64_t m, uint8_t* bits, int threads);

}  // namespace lowbit
