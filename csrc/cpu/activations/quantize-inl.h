// Symmetric int8 quantization of activations, bit for bit as the reference states it: scale = absmax / 127,
// q = round(x * min(127 / absmax, largest float)) to nearest even. A group whose absmax is not finite gets q = 0 and
// the scale NaN or infinity, so that its products are not finite either; with a given scale NaN does so, and infinity
// saturates.
#pragma once

#include "core/int8_table.h"
#include "cpu/activations/quantize.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// The largest |x| of x[0, count); NaN if there is one: patterns of absolute values order as integers, NaN on top.
inline float absmax_of(const void* x, Dtype dtype, int64_t at, int64_t count) {
  I top = set1_i(0);
  const I magnitude = set1_i(0x7FFFFFFF);
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes)
    top = max_i(top, bit_and(bits_of(load_as(x, dtype, at + i)), magnitude));
  if (i < count) top = max_i(top, bit_and(bits_of(load_tail(x, dtype, at + i, count - i)), magnitude));
  alignas(64) int32_t lanes[kVecLanes];
  store_i(lanes, top);
  int32_t largest = 0;
  for (int32_t v : lanes) largest = v > largest ? v : largest;
  float value;
  __builtin_memcpy(&value, &largest, 4);
  return value;
}

// q = round(x * inverse), saturated to -127 .. 127; NaN gives 0.
inline void scale_to_i8(const void* x, Dtype dtype, int64_t at, int64_t count, float inverse, int8_t* q) {
  const F factor = set1(inverse), low = set1(-127.0f);
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) {
    store_i8(q + i, max_or_nan(low, mul(load_as(x, dtype, at + i), factor)));
  }
  if (i < count) {
    alignas(64) int8_t bytes[kVecLanes];
    store_i8(bytes, max_or_nan(low, mul(load_tail(x, dtype, at + i, count - i), factor)));
    __builtin_memcpy(q + i, bytes, count - i);
  }
}

inline void quantize_row(const QuantizeInt8& z, int64_t row, int8_t* q) {
  constexpr float kLargest = 3.40282346638528859812e38f;
  const int64_t groups = ceil_div(z.k, z.group);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * z.group, left = z.k - begin, count = left < z.group ? left : z.group;
    const int64_t at = row * z.x_stride + begin;
    const float absmax = absmax_of(z.x, z.x_dtype, at, count);
    if (z.static_scales) {
      scale_to_i8(z.x, z.x_dtype, at, count, 1.0f / z.scales[row], q + begin);
      if (absmax != absmax) z.scales[row] = absmax;
      continue;
    }
    z.scales[row * groups + g] = absmax / 127.0f;
    if (absmax <= kLargest && absmax > 0) {
      const float inverse = 127.0f / absmax;
      scale_to_i8(z.x, z.x_dtype, at, count, inverse < kLargest ? inverse : kLargest, q + begin);
    } else {
      __builtin_memset(q + begin, 0, count);
    }
  }
}

// Row m of l.x as int8 at l.prepared, in the order of k, zero beyond it.
inline int8_t* quantized_row(const Launch& l, int64_t m) {
  int8_t* out = static_cast<int8_t*>(l.prepared) + m * l.prepared_stride;
  if (l.x_dtype == Dtype::kI8) {
    __builtin_memcpy(out, static_cast<const int8_t*>(l.x) + m * l.x_stride, l.k);
  } else {
    const int64_t group = l.x_group > 0 ? l.x_group : l.k;
    quantize_row({l.x, l.x_dtype, l.x_stride, l.k, group, l.x_scales, false}, m, out);
  }
  __builtin_memset(out + l.k, 0, l.prepared_stride - l.k);
  return out;
}

// The sums of a row of x over the parts of each segment.
inline int32_t* part_sums(const Launch& l, const Segments& s, int64_t row) {
  return reinterpret_cast<int32_t*>(l.x_sums) + row * s.count * s.parts;
}

// The scale of x that the terms of a segment meet one by one; only with `x_group`.
LOWBIT_INLINE inline F block_scale(const Launch& l, const Segments& s, int64_t row, int64_t segment) {
  return set1(l.x_scales[row * s.blocks + s.block(segment)]);
}
// What the sum of a row is multiplied by: the rest of the scales.
inline F row_scale(const Launch& l, int64_t row) {
  return set1(l.x_group > 0 ? l.table_step : l.x_scales[row] * l.table_step);
}

// total += y and y = 0 where `parts` of a sum of parts are done, for `count` columns.
inline void close_sums(int64_t parts, int64_t count, float* y, float* total) {
  if (parts % kSumParts != 0) return;
  for (int64_t i = 0; i < count; i += kVecLanes) {
    store(total + i, add(load(total + i), load(y + i)));
    store(y + i, zero());
  }
}

inline void sum_parts(const Launch& l, int64_t row, const int8_t* x) {
  const Segments s = segments_of(l);
  int32_t* sums = part_sums(l, s, row);
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t segment_end = (i + 1) * s.size < l.k ? (i + 1) * s.size : l.k;
    for (int64_t p = 0; p < s.parts; ++p) {
      const int64_t begin = i * s.size + p * kMaxInt8Group;
      const int64_t end = begin + kMaxInt8Group < segment_end ? begin + kMaxInt8Group : segment_end;
      int32_t sum = 0;
      for (int64_t k = begin; k < end; ++k) sum += x[k];
      *sums++ = sum;
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
