// What work costs: when a second thread pays, and picoseconds per weight of the kernels, by family. The latter measured
// on 4096 x 4096 weights rotated over 80 MiB and more, on one thread: of Zen 4 if nothing else is said. `consteval`, so
// that no unit holds a copy.
#pragma once

#include "core/kernel.h"

namespace lowbit {

// Nanoseconds of a parallel region with its barrier, and the least of a thread's work that is worth one.
constexpr double kRegionNs = 2000;
constexpr double kLeastNsPerThread = 1500;
// Picoseconds per weight of kernels that have no rivals and so no cost of their own (dequantize).
constexpr float kUnratedPs = 60;

// Below so much work a second thread costs more than it saves: one thread does it in about the time of a parallel
// region. Round numbers, from timing small calls with one thread and with two: not fitted.
constexpr int64_t kLeastConversions = 64 * 1024;        // elements of x that are converted or quantized, also to FP8
constexpr int64_t kLeastOutlierProducts = 32 * 1024;    // products of a sparse term
constexpr double kLeastFp8Products = 256 * 1024;        // products of two FP8 matrices
constexpr int64_t kLeastFp8AdamWParameters = 8 * 1024;  // parameters of a step of AdamW
// The least work of each thread, counted alike.
constexpr int64_t kEmbeddingWeightsPerThread = 64 * 1024;  // weights of an embedding's rows
constexpr int64_t kDecoderProductsPerThread = 64 * 1024;   // multiply-adds of a decoder between two barriers

// Rows of x from which outliers take tiles of 16: a row takes 0.4 ns for each entry by itself and a tile 1.6 (AVX2, x
// in L1 and L2).
constexpr int64_t kLeastOutlierTileRows = 5;

consteval Cost f32_gemv_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx512) {
    return bits == 8 && lut ? Cost{.single = 227, .fixed = 0, .pass = 332, .rows_per_pass = 4}
           : bits == 8      ? Cost{.single = 85, .fixed = 0, .pass = 100, .rows_per_pass = 4}
                            : Cost{.single = 38, .fixed = 0, .pass = 83, .rows_per_pass = 4};
  }
  return bits >= 6 && lut ? Cost{.single = 424, .fixed = 0, .pass = 479, .rows_per_pass = 4}
         : bits == 8      ? Cost{.single = 94, .fixed = 0, .pass = 190, .rows_per_pass = 4}
                          : Cost{.single = 80, .fixed = 0, .pass = 163, .rows_per_pass = 4};
}
// Plain C++: Zen 5.
consteval Cost f32_gemm_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kScalar) return {.single = 1700, .fixed = 1300, .pass = 700, .rows_per_pass = 2};
  if (isa == kAvx512) {
    return bits == 8 && lut ? Cost{.single = 450, .fixed = 415, .pass = 110, .rows_per_pass = 6}
           : bits == 8      ? Cost{.single = 226, .fixed = 195, .pass = 109, .rows_per_pass = 6}
                            : Cost{.single = 158, .fixed = 128, .pass = 109, .rows_per_pass = 6};
  }
  return bits >= 6 && lut ? Cost{.single = 600, .fixed = 530, .pass = 118, .rows_per_pass = 6}
         : bits == 8      ? Cost{.single = 285, .fixed = 220, .pass = 115, .rows_per_pass = 6}
                          : Cost{.single = 236, .fixed = 175, .pass = 115, .rows_per_pass = 6};
}

consteval Cost bf16_gemv_cost(int bits, Codec codec) {
  return codec == Codec::kInt ? Cost{.single = 25, .fixed = 0, .pass = 76, .rows_per_pass = 4}
         : bits == 8          ? Cost{.single = 44, .fixed = 38, .pass = 39, .rows_per_pass = 4}
                              : Cost{.single = 17, .fixed = 0, .pass = 39, .rows_per_pass = 4};
}
consteval Cost bf16_gemm_cost(int bits) {
  return bits == 8 ? Cost{.single = 80, .fixed = 20, .pass = 56, .rows_per_pass = 6}
                   : Cost{.single = 55, .fixed = 12, .pass = 56, .rows_per_pass = 6};
}
consteval Cost bf16_columns_cost(int bits) {
  return bits == 8 ? Cost{.single = 190, .fixed = 150, .pass = 75, .rows_per_pass = 4}
                   : Cost{.single = 40, .fixed = 20, .pass = 42, .rows_per_pass = 4};
}

consteval Cost f16_gemv_cost(int bits) {
  return bits == 8 ? Cost{.single = 83, .fixed = 0, .pass = 105, .rows_per_pass = 4}
                   : Cost{.single = 31, .fixed = 0, .pass = 80, .rows_per_pass = 4};
}
consteval Cost f16_gemm_cost(int bits) {
  return bits == 8 ? Cost{.single = 80, .fixed = 68, .pass = 122, .rows_per_pass = 6}
                   : Cost{.single = 51, .fixed = 28, .pass = 113, .rows_per_pass = 6};
}

// With AVX2, wide products take two instructions for one.
consteval Cost i8_skinny_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx2) {
    const float pass = lut ? 108.0f : bits == 8 ? 97.0f : 50.0f;
    return lut && bits >= 6 ? Cost{.single = 185, .fixed = 60, .pass = 236, .rows_per_pass = 4}
           : bits == 3 || bits == 5 || bits == 6
               ? Cost{.single = 42, .fixed = 15, .pass = pass + 16, .rows_per_pass = 4}
           : bits == 8 ? Cost{.single = 120, .fixed = 20, .pass = pass, .rows_per_pass = 4}
                       : Cost{.single = 44, .fixed = 5, .pass = pass, .rows_per_pass = 4};
  }
  return bits == 8   ? Cost{.single = 75, .fixed = 20, .pass = lut ? 52.0f : 44.0f, .rows_per_pass = 8}
         : bits == 6 ? Cost{.single = 60, .fixed = 5, .pass = 52, .rows_per_pass = 8}
         : bits == 5 ? Cost{.single = 40, .fixed = 10, .pass = 50, .rows_per_pass = 8}
         : bits == 3 ? Cost{.single = 18, .fixed = 27, .pass = 49, .rows_per_pass = 8}
         : bits == 4 ? Cost{.single = 21, .fixed = 2, .pass = lut ? 45.0f : 40.0f, .rows_per_pass = 8}
                     : Cost{.single = 10, .fixed = 2, .pass = 40, .rows_per_pass = 8};
}
consteval Cost i8_gemm_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx2) {
    const float pass = lut ? 93.0f : bits == 8 ? 83.0f : 46.0f;
    return lut && bits >= 6         ? Cost{.single = 190, .fixed = 160, .pass = pass, .rows_per_pass = 4}
           : bits == 4 || bits <= 2 ? Cost{.single = 46, .fixed = 35, .pass = pass, .rows_per_pass = 4}
                                    : Cost{.single = 89, .fixed = 70, .pass = pass, .rows_per_pass = 4};
  }
  const float pass = lut && bits >= 4 ? 34.0f : 32.0f;
  return bits >= 6   ? Cost{.single = 67, .fixed = bits == 8 ? 55.0f : 41.0f, .pass = pass, .rows_per_pass = 6}
         : bits >= 3 ? Cost{.single = 28, .fixed = 22, .pass = pass, .rows_per_pass = 6}
                     : Cost{.single = 18, .fixed = 5, .pass = pass, .rows_per_pass = 6};
}

consteval Cost nibbles_cost(bool bf16_table) {
  return bf16_table ? Cost{.single = 52, .fixed = 0, .pass = 76, .rows_per_pass = 2}
                    : Cost{.single = 58, .fixed = 0, .pass = 75, .rows_per_pass = 2};
}

// Measured on Zen 3 beside the 4-bit kernels, and scaled to their costs on Zen 4.
consteval Cost float8_gemv_cost() { return {.single = 85, .fixed = 0, .pass = 105, .rows_per_pass = 2}; }
consteval Cost float8_gemm_cost() { return {.single = 290, .fixed = 202, .pass = 115, .rows_per_pass = 6}; }

// Plain C++ with int8 activations.
consteval Cost i8_any_cost(Codec codec) {
  return codec == Codec::kLut ? Cost{.single = 1720, .fixed = 1500, .pass = 2740, .rows_per_pass = 16}
                              : Cost{.single = 770, .fixed = 650, .pass = 1990, .rows_per_pass = 16};
}

// Estimated from counted instructions, not measured: it decides the number of threads alone, as these kernels have no
// rivals.
consteval Cost xnor_cost(Isa isa) {
  return isa == kScalar ? Cost{.single = 80, .fixed = 20, .pass = 260, .rows_per_pass = 4}
         : isa == kAvx2 ? Cost{.single = 8, .fixed = 4, .pass = 14, .rows_per_pass = 4}
                        : Cost{.single = 5, .fixed = 2, .pass = 4, .rows_per_pass = 4};
}

}  // namespace lowbit
