// Convolutions with groups of channels in fp32, filters in the lanes. Each sum is over the taps, and in a tap over the
// channels of the group, in their order.
#pragma once

#include "cpu/conv/conv.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

static_assert(kMostLanes % kVecLanes == 0);
constexpr int kConvOutputs = 4;  // side by side along the last dimension

// Where the inputs of a vector of filters lie among the channels of a pixel.
enum class Lanes { kSame, kOne, kIndexed };

// The x that filters n0 .. n0 + kVecLanes multiply by their k-th weight of a tap.
template <Lanes kLanes>
LOWBIT_INLINE inline F inputs_of(const GroupedConv& c, int64_t pixel, int64_t n0, int64_t k, int64_t first, I index) {
  const int64_t at = pixel * c.shape.channels;
  if constexpr (kLanes == Lanes::kSame) {
    return c.n - n0 >= kVecLanes ? load_as(c.x, c.x_dtype, at + n0) : load_tail(c.x, c.x_dtype, at + n0, c.n - n0);
  } else if constexpr (kLanes == Lanes::kOne) {
    return set1(static_cast<const float*>(c.x)[at + first + k]);
  } else {
    return load_indexed(static_cast<const float*>(c.x) + at + k, index);
  }
}

// kCount outputs of a line from `w` on, kVecLanes filters from n0 on.
template <Lanes kLanes, int kCount>
inline void conv_tile(const GroupedConv& c, int64_t image, int64_t d, int64_t h, int64_t w, int64_t n0, I index) {
  const ConvShape& s = c.shape;
  const int64_t depth = s.channels / s.groups, first = n0 / (c.n / s.groups) * depth;
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
      for (int64_t e = 0; e < s.kernel[2]; ++e) {
        const int64_t tap = (a * s.kernel[1] + b) * s.kernel[2] + e, shift = e * s.dilation[2];
        const bool inside = w0 + shift >= 0 && w_last + shift < s.size[2];
        for (int64_t k = 0; k < depth; ++k) {
          const F weight = load(c.weight + (tap * depth + k) * c.padded_n + n0);
          unroll<kCount>([&](auto j) LOWBIT_INLINE {
            const int64_t iw = w0 + shift + j * s.stride[2];
            if (inside || (iw >= 0 && iw < s.size[2])) {
              acc[j] = fma(weight, inputs_of<kLanes>(c, line + iw, n0, k, first, index), acc[j]);
            }
          });
        }
      }
    }
  }
  const int64_t count = c.n - n0 < kVecLanes ? c.n - n0 : kVecLanes;
  const F bias = c.bias ? load_tail(c.bias, c.bias_dtype, n0, count) : zero();
  const int64_t row = ((image * s.out[0] + d) * s.out[1] + h) * s.out[2] + w;
  unroll<kCount>([&](auto j) LOWBIT_INLINE {
    alignas(64) float y[kVecLanes];
    store(y, c.bias ? add(acc[j], bias) : acc[j]);
    if (c.activation != Activation::kNone) activate(c.activation, y, count);
    store_as(c.out, c.out_dtype, (row + j) * c.n + n0, y, count);
  });
}

template <Lanes kLanes>
inline void conv_line(const GroupedConv& c, int64_t image, int64_t d, int64_t h, int64_t n0, I index) {
  int64_t w = 0;
  for (; w + kConvOutputs <= c.shape.out[2]; w += kConvOutputs) {
    conv_tile<kLanes, kConvOutputs>(c, image, d, h, w, n0, index);
  }
  for (; w < c.shape.out[2]; ++w) conv_tile<kLanes, 1>(c, image, d, h, w, n0, index);
}

void grouped_conv(const GroupedConv& c, int64_t begin, int64_t end) {
  const ConvShape& s = c.shape;
  const int64_t filters = c.n / s.groups, depth = s.channels / s.groups;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], image = line / s.out[1] / s.out[0];
    for (int64_t n0 = 0; n0 < c.n; n0 += kVecLanes) {
      if (filters == 1 && depth == 1) {
        conv_line<Lanes::kSame>(c, image, d, h, n0, set1_i(0));
      } else if (filters % kVecLanes == 0) {
        conv_line<Lanes::kOne>(c, image, d, h, n0, set1_i(0));
      } else {
        alignas(64) int32_t index[kVecLanes];
        for (int i = 0; i < kVecLanes; ++i) {
          const int64_t n = n0 + i < c.n ? n0 + i : c.n - 1;
          index[i] = static_cast<int32_t>(n / filters * depth);
        }
        conv_line<Lanes::kIndexed>(c, image, d, h, n0, load_i(index));
      }
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
