// Convolutions with groups of channels in fp32, filters in the lanes. Each sum is over the taps, and in a tap over the
// channels of the group, in their order.
#pragma once

#include "cpu/conv/conv.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

static_assert(kMostLanes % kVecLanes == 0);
// Side by side along the last dimension: images are 7 * 2^i wide in most networks.
constexpr int kConvOutputs = 7;

// Where the inputs of a vector of filters lie among the channels of a pixel.
enum class Lanes { kSame, kOne, kIndexed };

// What a vector of filters multiplies by their k-th weight of a tap, of the pixel that starts at element `at` of x.
// `n0` is the first filter, or, where they are of one group, the first channel of that.
template <Lanes kLanes, Dtype kX, bool kWhole>
LOWBIT_INLINE inline F inputs_of(const void* x, int64_t at, int64_t n0, int64_t k, int64_t count, I index) {
  if constexpr (kLanes == Lanes::kSame) {
    return kWhole ? load_as(x, kX, at + n0) : load_tail(x, kX, at + n0, count);
  } else if constexpr (kLanes == Lanes::kOne) {
    return set1(static_cast<const float*>(x)[at + n0 + k]);
  } else {
    return load_indexed(static_cast<const float*>(x) + at + k, index);
  }
}

// kCount outputs of a line from `w` on, `count` filters from n0 on.
template <Lanes kLanes, Dtype kX, bool kWhole, int kCount>
inline void conv_tile(const GroupedConv& c, int64_t image, int64_t d, int64_t h, int64_t w, int64_t n0, int64_t count,
                      I index) {
  const ConvShape s = c.shape;
  const void* const x = c.x;
  const int64_t depth = s.channels / s.groups, step = s.stride[2] * s.channels;
  const int64_t first = kLanes == Lanes::kOne ? n0 / (c.n / s.groups) * depth : n0;
  F acc[kCount];
  unroll<kCount>([&](auto j) LOWBIT_INLINE { acc[j] = zero(); });
  const int64_t w0 = w * s.stride[2] - s.before[2], w_last = w0 + (kCount - 1) * s.stride[2];
  for (int64_t a = 0; a < s.kernel[0]; ++a) {
    const int64_t id = d * s.stride[0] - s.before[0] + a * s.dilation[0];
    if (id < 0 || id >= s.size[0]) continue;
    for (int64_t b = 0; b < s.kernel[1]; ++b) {
      const int64_t ih = h * s.stride[1] - s.before[1] + b * s.dilation[1];
      if (ih < 0 || ih >= s.size[1]) continue;
      const int64_t line = ((image * s.size[0] + id) * s.size[1] + ih) * s.size[2];
      const float* weights = c.weight + (a * s.kernel[1] + b) * s.kernel[2] * depth * c.padded_n + n0;
      for (int64_t e = 0; e < s.kernel[2]; ++e) {
        const int64_t iw = w0 + e * s.dilation[2], at = (line + iw) * s.channels;
        if (iw >= 0 && w_last + e * s.dilation[2] < s.size[2]) {
          for (int64_t k = 0; k < depth; ++k, weights += c.padded_n) {
            const F weight = load(weights);
            unroll<kCount>([&](auto j) LOWBIT_INLINE {
              acc[j] = fma(weight, inputs_of<kLanes, kX, kWhole>(x, at + j * step, first, k, count, index), acc[j]);
            });
          }
          continue;
        }
        for (int64_t k = 0; k < depth; ++k, weights += c.padded_n) {
          const F weight = load(weights);
          unroll<kCount>([&](auto j) LOWBIT_INLINE {
            const int64_t pixel = iw + j * s.stride[2];
            if (pixel < 0 || pixel >= s.size[2]) return;
            acc[j] = fma(weight, inputs_of<kLanes, kX, kWhole>(x, at + j * step, first, k, count, index), acc[j]);
          });
        }
      }
    }
  }
  const F bias = c.bias ? load_tail(c.bias, c.bias_dtype, n0, count) : zero();
  const int64_t row = ((image * s.out[0] + d) * s.out[1] + h) * s.out[2] + w;
  unroll<kCount>([&](auto j) LOWBIT_INLINE {
    alignas(64) float y[kVecLanes];
    store(y, c.bias ? add(acc[j], bias) : acc[j]);
    if (c.activation != Activation::kNone) activate(c.activation, y, count);
    store_as(c.out, c.out_dtype, (row + j) * c.n + n0, y, count);
  });
}

// The channels of the first filter of each group of `filters`, from n0 on.
inline I group_starts(const GroupedConv& c, int64_t n0, int64_t filters, int64_t depth) {
  alignas(64) int32_t index[kVecLanes];
  for (int i = 0; i < kVecLanes; ++i) {
    const int64_t n = n0 + i < c.n ? n0 + i : c.n - 1;
    index[i] = static_cast<int32_t>(n / filters * depth);
  }
  return load_i(index);
}

template <Lanes kLanes, Dtype kX>
inline void conv_lines(const GroupedConv& c, int64_t begin, int64_t end) {
  const ConvShape& s = c.shape;
  const int64_t filters = c.n / s.groups, depth = s.channels / s.groups;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], image = line / s.out[1] / s.out[0];
    for (int64_t w = 0, width = 0; w < s.out[2]; w += width) {
      width = s.out[2] - w < kConvOutputs ? 1 : kConvOutputs;
      for (int64_t n0 = 0; n0 < c.n; n0 += kVecLanes) {
        const int64_t count = c.n - n0 < kVecLanes ? c.n - n0 : kVecLanes;
        const I index = kLanes == Lanes::kIndexed ? group_starts(c, n0, filters, depth) : set1_i(0);
        if (width > 1 && count == kVecLanes) {
          conv_tile<kLanes, kX, true, kConvOutputs>(c, image, d, h, w, n0, count, index);
        } else {
          for (int64_t i = w; i < w + width; ++i) conv_tile<kLanes, kX, false, 1>(c, image, d, h, i, n0, count, index);
        }
      }
    }
  }
}

void grouped_conv(const GroupedConv& c, int64_t begin, int64_t end) {
  const int64_t filters = c.n / c.shape.groups, depth = c.shape.channels / c.shape.groups;
  if (filters == 1 && depth == 1) {
    switch (c.x_dtype) {
      case Dtype::kBf16:
        return conv_lines<Lanes::kSame, Dtype::kBf16>(c, begin, end);
      case Dtype::kF16:
        return conv_lines<Lanes::kSame, Dtype::kF16>(c, begin, end);
      default:
        return conv_lines<Lanes::kSame, Dtype::kF32>(c, begin, end);
    }
  }
  if (filters % kVecLanes == 0) return conv_lines<Lanes::kOne, Dtype::kF32>(c, begin, end);
  conv_lines<Lanes::kIndexed, Dtype::kF32>(c, begin, end);
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
