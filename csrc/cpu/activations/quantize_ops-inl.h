// What quantizes activations: rows to int8 (quantize-inl.h), and rows to signs.
#pragma once

#include "cpu/activations/quantize-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline void binary_row(const QuantizeBinary& z, int64_t row, uint8_t* bits) {
  // A long row is summed in pieces of 16 vectors: one chain of additions would round worse.
  constexpr int64_t kPiece = 16 * kVecLanes;
  const I magnitude = set1_i(0x7FFFFFFF);
  F sums = zero();
  for (int64_t begin = 0; begin < z.k; begin += kPiece) {
    F piece = zero();
    for (int64_t i = begin; i < z.k && i < begin + kPiece; i += kVecLanes) {
      const int64_t at = row * z.x_stride + i, left = z.k - i;
      const F v = left < kVecLanes ? load_tail(z.x, z.x_dtype, at, left) : load_as(z.x, z.x_dtype, at);
      uint32_t mask = nonnegative(v);
      if (left < kVecLanes) mask &= (1u << left) - 1;
      __builtin_memcpy(bits + i / 8, &mask, left < kVecLanes ? ceil_div(left, 8) : kVecLanes / 8);
      piece = add(piece, as_float(bit_and(bits_of(v), magnitude)));
    }
    sums = add(sums, piece);
  }
  z.scales[row] = sum_lanes(sums) / static_cast<float>(z.k);
}

void quantize_int8_rows(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) quantize_row(z, row, q + row * z.k);
}
void quantize_binary_rows(const QuantizeBinary& z, uint8_t* bits, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) binary_row(z, row, bits + row * ceil_div(z.k, 8));
}

constexpr QuantizeOps kQuantizeOps{.int8 = quantize_int8_rows, .binary = quantize_binary_rows};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
