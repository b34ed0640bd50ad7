// Convolutions of x (batch, size, channels), channels innermost, with results (batch, out, n). Compiled under every
// instruction set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

// Three spatial dimensions, of which the first may be of size 1. A patch holds the channels / groups of each tap.
struct ConvShape {
  int64_t batch = 0, channels = 0, groups = 1;
  int64_t size[3] = {}, kernel[3] = {}, stride[3] = {}, before[3] = {}, dilation[3] = {}, out[3] = {};

  constexpr int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  constexpr int64_t pixels() const { return batch * size[0] * size[1] * size[2]; }
  constexpr int64_t rows() const { return batch * out[0] * out[1] * out[2]; }
};

// Without groups: a product of patches, of which each thread makes a tile at a time. `l` is that of the whole product:
// x as above, out (rows, n). Of int8 x, `x_scales` are those of its pixels: one number, or NaN.
void run_conv(const Kernel& kernel, Launch l, const ConvShape& shape, int threads);

// With groups of channels.
struct GroupedConv {
  ConvShape shape;
  const void* x;  // fp32, or of any float type where every channel is a group with one filter
  Dtype x_dtype;
  int64_t n;
  const void* bias;  // may be null
  Dtype bias_dtype;
  Activation activation;
  void* out;
  Dtype out_dtype;
  // Set by run_grouped_conv.
  const float* weight = nullptr;  // (taps, channels / groups, padded_n), 0 beyond n
  int64_t padded_n = 0;           // a multiple of kMostLanes
};
constexpr int kMostLanes = 16;

using RunGroupedConv = void (*)(const GroupedConv& c, int64_t line_begin, int64_t line_end);

// The instruction set of the kernel that runs with a mask.
const char* grouped_conv_isa(uint32_t isa_mask);
// `weight` is decoded by a kernel for that.
void run_grouped_conv(GroupedConv c, const Kernel& decode, Launch weight, uint32_t isa, int threads);

}  // namespace lowbit
