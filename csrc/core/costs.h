// What work costs: when a second thread pays, and picoseconds per weight of the kernels.
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
constexpr int64_t kConvProductsPerThread = 128 * 1024;     // multiply-adds of a convolution

// Rows of x from which outliers take tiles of 16: a row takes 0.4 ns for each entry by itself and a tile 1.6 (AVX2, x
// in L1 and L2).
constexpr int64_t kLeastOutlierTileRows = 5;

// What a kernel costs, by its name. csrc/core/costs/ has a table for each CPU that was measured.
struct KernelCost {
  const char* name;
  Cost cost;
};
// From the table of the nearest CPU that was measured: Sapphire Rapids for all of Intel's, Zen 5 for others. A kernel
// without rivals may be missing there: it counts as kUnratedPs.
Cost cost_of(const Kernel& kernel);

}  // namespace lowbit
