// FP8 quantization of matrices by blocks (fp8.h), from the codecs of fp8-inl.h.
#pragma once

#include "cpu/fp8/fp8-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Calls fn with the dtype as a constant.
template <class Fn>
inline auto with_dtype(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::kF32:
      return fn(Constant<Dtype::kF32>{});
    case Dtype::kBf16:
      return fn(Constant<Dtype::kBf16>{});
    default:
      return fn(Constant<Dtype::kF16>{});
  }
}
template <class Fn>
inline auto with_type(Float8 type, const Fn& fn) {
  return type == Float8::kE4m3 ? fn(Constant<Float8::kE4m3>{}) : fn(Constant<Float8::kE5m2>{});
}
// Calls fn with the width of a block, or with 0 for any other: loops of a few steps are unrolled.
template <class Fn>
inline auto with_width(int64_t block_k, const Fn& fn) {
  return block_k == 16 ? fn(Constant<16>{}) : block_k == 32 ? fn(Constant<32>{}) : fn(Constant<0>{});
}

// `top` with the largest magnitudes of x[at, at + count) by lanes; NaN is above all others.
template <Dtype X>
inline I fold_magnitudes(const void* x, int64_t at, int64_t count, I top) {
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) top = max_i(top, magnitude_of(bits_of(load_as(x, X, at + i))));
  if (i < count) top = max_i(top, magnitude_of(bits_of(load_tail(x, X, at + i, count - i))));
  return top;
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of a row that are looked at together: their maxima take one fold and one division. Blocks of many rows must
// stay in cache until they are encoded.
inline int64_t blocks_at_once(const Fp8Blocks& b) { return b.block_rows > 1 ? 8 : kVecLanes; }

// Calls fn(first column, columns, index) for the blocks of a row from `column` to `end`.
template <int kWidth, class Fn>
LOWBIT_INLINE inline void for_each_block(int64_t block_k, int64_t column, int64_t end, const Fn& fn) {
  int64_t i = 0;
  if constexpr (kWidth > 0) {
    for (; column + kWidth <= end; column += kWidth) fn(column, int64_t{kWidth}, i++);
  }
  for (; column < end; column += block_k) fn(column, min_of(block_k, end - column), i++);
}

// Maxima of the blocks from `column` on in the rows [row, row_end) of one band, in lanes.
template <Dtype X, int kWidth>
inline I maxima_of(const Fp8Blocks& b, const Fp8Source& x, int64_t row, int64_t row_end, int64_t column, int64_t end) {
  I tops[kVecLanes];
  for (I& top : tops) top = set1_i(0);
  constexpr int kSize = size_of(X);
  const char* bytes = static_cast<const char*>(x.x);
  for (int64_t r = row; r < row_end; ++r) {
    if (r + 3 < row_end) {
      // Few columns of each row: the hardware does not foresee the next ones.
      for (int64_t c = column; c < end; c += 64 / kSize) prefetch(bytes + ((r + 3) * x.stride + c) * kSize);
    }
    for_each_block<kWidth>(b.block_k, column, end, [&](int64_t c, int64_t count, int64_t i) LOWBIT_INLINE {
      tops[i] = fold_magnitudes<X>(x.x, r * x.stride + c, count, tops[i]);
    });
  }
  return max_of_each(tops);
}

// Calls fn(row, row_end, column, column_end) for groups of blocks of one band that `blocks_at_once` allows.
template <class Fn>
inline void for_each_group(const Fp8Blocks& b, const Fp8Region& g, const Fn& fn) {
  const int64_t width = blocks_at_once(b) * b.block_k;
  for (int64_t row = g.row; row < g.row_end; row += b.block_rows) {
    const int64_t row_end = min_of(row + b.block_rows, g.row_end);
    for (int64_t column = g.column; column < g.column_end; column += width) {
      fn(row, row_end, column, min_of(column + width, g.column_end));
    }
  }
}

inline int64_t block_index(const Fp8Blocks& b, int64_t row, int64_t column) {
  return row / b.block_rows * b.row_blocks + column / b.block_k;
}

template <Dtype X>
float largest_as(const Fp8Source& x, const Fp8Region& g) {
  I tops[kVecLanes];
  for (I& top : tops) top = set1_i(0);
  for (int64_t r = g.row; r < g.row_end; ++r) {
    tops[0] = fold_magnitudes<X>(x.x, r * x.stride + g.column, g.column_end - g.column, tops[0]);
  }
  alignas(64) float lanes[kVecLanes];
  store(lanes, as_float(max_of_each(tops)));
  return lanes[0];
}

template <Dtype X, int kWidth>
void maxima_as(const Fp8Blocks& b, const Fp8Source& x, const Fp8Region& g, float* out) {
  for_each_group(b, g, [&](int64_t row, int64_t row_end, int64_t column, int64_t end) {
    alignas(64) float lanes[kVecLanes];
    store(lanes, as_float(maxima_of<X, kWidth>(b, x, row, row_end, column, end)));
    float* to = out + block_index(b, row, column);
    for (int64_t i = 0; column + i * b.block_k < end; ++i) to[i] = lanes[i];
  });
}

// Codes of x[at, at + count), which are those of `row` from `column` on, divided by the scale.
template <Dtype X, Float8 T, bool kStochastic>
LOWBIT_INLINE inline void encode_run(const Fp8Quantize& z, int64_t row, int64_t column, int64_t count, float scale,
                                     [[maybe_unused]] const RowNoise& noise) {
  const F divisor = set1(scale);
  const void* x = z.x.x;
  const int64_t at = row * z.x.stride + column;
  uint8_t* q = z.q + row * z.blocks.k + column;
  const auto codes = [&](F v, int64_t i) {
    if constexpr (kStochastic) return encode_stochastic<T>(div(v, divisor), noise.at(column + i));
    return encode<T>(div(v, divisor), Fp8<T>::kMaxCode, false);
  };
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) store_u8(q + i, codes(load_as(x, X, at + i), i));
  if (i < count) {
    alignas(64) uint8_t bytes[kVecLanes];
    store_u8(bytes, codes(load_tail(x, X, at + i, count - i), i));
    __builtin_memcpy(q + i, bytes, count - i);
  }
}

template <Dtype X, Float8 T, bool kStochastic, int kWidth>
void quantize_as(const Fp8Quantize& z, const Fp8Region& g) {
  const Fp8Blocks& b = z.blocks;
  for_each_group(b, g, [&](int64_t row, int64_t row_end, int64_t column, int64_t end) {
    const int64_t first = block_index(b, row, column);
    I maxima;
    if (z.maxima) {
      alignas(64) float given[kVecLanes] = {};
      for (int64_t i = 0; column + i * b.block_k < end; ++i) given[i] = z.maxima[first + i];
      maxima = magnitude_of(bits_of(load(given)));
    } else {
      maxima = maxima_of<X, kWidth>(b, z.x, row, row_end, column, end);
    }
    const F made = make_scales<T>(maxima, z.scale_type);
    alignas(64) float scales[kVecLanes];
    store(scales, made);
    // A scale that rows share is written once.
    if (b.row_blocks != 0 || (row == 0 && column == 0)) {
      store_scales(z.scales, z.scale_type, first, made, (end - column + b.block_k - 1) / b.block_k);
    }
    for (int64_t r = row; r < row_end; ++r) {
      const RowNoise noise(z.seed, r);
      for_each_block<kWidth>(b.block_k, column, end, [&](int64_t c, int64_t count, int64_t i) LOWBIT_INLINE {
        encode_run<X, T, kStochastic>(z, r, c, count, scales[i], noise);
      });
    }
  });
}

template <Float8 T, Dtype Out>
void dequantize_as(const Fp8Dequantize& z, const Fp8Region& g) {
  const Fp8Blocks& b = z.blocks;
  constexpr int kSize = size_of(Out);
  for (int64_t row = g.row; row < g.row_end; ++row) {
    for (int64_t column = g.column, end; column < g.column_end; column = end) {
      end = min_of((column / b.block_k + 1) * b.block_k, g.column_end);
      const F scale = set1(load_scale(z.scales, z.scale_type, block_index(b, row, column)));
      const uint8_t* q = z.q + row * b.k;
      char* out = static_cast<char*>(z.out) + row * b.k * kSize;
      const auto put = [](void* to, F v) {
        if constexpr (Out == Dtype::kF32) {
          store(static_cast<float*>(to), v);
        } else if constexpr (Out == Dtype::kBf16) {
          store_bf16(static_cast<uint16_t*>(to), v);
        } else {
          store_f16(static_cast<uint16_t*>(to), v);
        }
      };
      int64_t i = column;
      for (; i + kVecLanes <= end; i += kVecLanes) put(out + i * kSize, mul(decode<T>(load_u8(q + i)), scale));
      if (i < end) {
        alignas(64) uint8_t bytes[kVecLanes] = {};
        alignas(64) char values[kVecLanes * kSize];
        __builtin_memcpy(bytes, q + i, end - i);
        put(values, mul(decode<T>(load_u8(bytes)), scale));
        __builtin_memcpy(out + i * kSize, values, (end - i) * kSize);
      }
    }
  }
}

template <Dtype X, Float8 T>
void cast_as(const Fp8Source& x, bool saturate, const Fp8Region& g, uint8_t* q) {
  const int32_t top = saturate ? Fp8<T>::kMaxCode : Fp8<T>::kOverflow;
  int64_t i = g.column;
  for (; i + kVecLanes <= g.column_end; i += kVecLanes) store_u8(q + i, encode<T>(load_as(x.x, X, i), top, true));
  if (i < g.column_end) {
    const int64_t left = g.column_end - i;
    alignas(64) uint8_t bytes[kVecLanes];
    store_u8(bytes, encode<T>(load_tail(x.x, X, i, left), top, true));
    __builtin_memcpy(q + i, bytes, left);
  }
}

float largest(const Fp8Source& x, const Fp8Region& g) {
  return with_dtype(x.dtype, [&](auto dtype) { return largest_as<dtype.value>(x, g); });
}
void maxima(const Fp8Blocks& b, const Fp8Source& x, const Fp8Region& g, float* out) {
  with_dtype(x.dtype, [&](auto dtype) {
    with_width(b.block_k, [&](auto width) { maxima_as<dtype.value, width.value>(b, x, g, out); });
  });
}
void quantize(const Fp8Quantize& z, const Fp8Region& g) {
  with_dtype(z.x.dtype, [&](auto dtype) {
    with_type(z.type, [&](auto type) {
      with_width(z.blocks.block_k, [&](auto width) {
        if (z.stochastic) {
          quantize_as<dtype.value, type.value, true, width.value>(z, g);
        } else {
          quantize_as<dtype.value, type.value, false, width.value>(z, g);
        }
      });
    });
  });
}
void dequantize(const Fp8Dequantize& z, const Fp8Region& g) {
  with_dtype(z.out_dtype,
             [&](auto dtype) { with_type(z.type, [&](auto type) { dequantize_as<type.value, dtype.value>(z, g); }); });
}
void cast(const Fp8Source& x, Float8 type, bool saturate, const Fp8Region& g, uint8_t* q) {
  with_dtype(x.dtype, [&](auto dtype) {
    with_type(type, [&](auto constant) { cast_as<dtype.value, constant.value>(x, saturate, g, q); });
  });
}

constexpr Fp8Ops kFp8Ops = {largest, maxima, quantize, dequantize, cast};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit

#define LOWBIT_EXPORT_FP8                                                          \
  namespace lowbit {                                                               \
  const Fp8Ops& LOWBIT_CAT(fp8_ops_, LOWBIT_ISA)() { return LOWBIT_ISA::kFp8Ops; } \
  }
