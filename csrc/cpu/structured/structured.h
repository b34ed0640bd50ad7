// Weights of structured formats as files hold them, row by row (python/lowbit/structured.py): rows of the weight, and
// products with few rows of x. Compiled under every instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

// From kIq1S on: blocks of 256 weights as GGUF files hold them, whose kernels are a family of their own.
enum class StructuredCodec : int32_t { kVector, kE8p, kTrellis, kIq1S, kIq1M, kIq2Xxs, kIq2Xs, kIq2S, kIq3Xxs, kIq3S };
constexpr int64_t kBlockWeights = 256;

struct StructuredWeight {
  StructuredCodec codec;
  int bits, dim;  // of a code, and the weights that it stands for
  int64_t n, k, row_bytes;
  const uint8_t* codes;  // (n, row_bytes)
  // kVector: (2^bits, dim). kE8p: vectors of absolute values (256, 8), and with 24 bits the points (256, 8) of the
  // second stage. Blocks: (2, 8), levels without and with the bit that lies apart. Values are finite.
  const float* table;
  const float* signs;    // kE8p: (128, 8), by the bits of seven signs
  const uint32_t* grid;  // blocks: the numbers of the levels of each vector, 8 or 4 nibbles below 8
  float second;          // kE8p: what a point of the second stage is multiplied by
  const void* scales;    // (n, groups), or null for 1
  Dtype scale_dtype;
  int64_t group, groups;  // a multiple of 8, or at least k
};

// Trellis: a weight is (the sum of the bytes of state * factor + addend, less 510) / 128.
constexpr uint32_t kTrellisFactor = 34038481, kTrellisAddend = 76625530;

struct StructuredRows {
  StructuredWeight w;
  const int64_t* rows;  // (count), each in [0, n), or null for all
  int64_t count;
  void* out;  // (count, k)
  Dtype out_dtype;
};

constexpr int64_t kStructuredRows = 8;  // of x
struct StructuredLinear {
  StructuredWeight w;
  const void* x;  // (m, k), unit stride along k
  Dtype x_dtype;
  int64_t m, x_stride;  // m is at most kStructuredRows
  const void* bias;     // (n), or null
  Dtype bias_dtype;
  void* out;  // (m, n)
  Dtype out_dtype;
  // Set by structured_linear.
  float* prepared;   // x in fp32, (m, padded_k), zeros beyond k; of blocks in any order and dtype
  int64_t padded_k;  // k, rounded up to whole chunks
};
constexpr int64_t kStructuredTile = 16;    // rows of the weight of a task
constexpr int64_t kStructuredChunk = 256;  // weights that are decoded at a time

struct StructuredKernel {
  void (*rows)(const StructuredRows& r, int64_t begin, int64_t end);  // tasks are rows
  void (*prepare)(const StructuredLinear& l);
  void (*linear)(const StructuredLinear& l, int64_t begin, int64_t end);  // tasks are tiles of rows
};

// The instruction set of the kernels that run with a mask.
const char* structured_isa(StructuredCodec codec, uint32_t isa_mask);

void structured_rows(const StructuredRows& request, uint32_t isa, int threads);
// Sums in fp32, rounded once.
void structured_linear(StructuredLinear request, uint32_t isa, int threads);

}  // namespace lowbit
