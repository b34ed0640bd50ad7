// The row-wise functions of decoder_ops.h: norms, rotary embedding, activation, dense rows, argmax.
#pragma once

#include "cpu/common-inl.h"
#include "cpu/decoder_ops.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <Dtype kType>
inline F load_t(const void* p, int64_t i) {
  return load_as(p, kType, i);
}

template <Dtype kType>
inline void store_t(void* p, int64_t i, F v) {
  if constexpr (kType == Dtype::kF32) {
    store(static_cast<float*>(p) + i, v);
  } else if constexpr (kType == Dtype::kBf16) {
    store_bf16(static_cast<uint16_t*>(p) + i, v);
  } else {
    store_f16(static_cast<uint16_t*>(p) + i, v);
  }
}

template <Dtype kType>
inline F round_t(F v) {
  if constexpr (kType == Dtype::kF32) {
    return v;
  } else {
    alignas(64) uint16_t rounded[kVecLanes];
    store_t<kType>(rounded, 0, v);
    return load_t<kType>(rounded, 0);
  }
}

// Calls fn with a Dtype of an activation as a constant.
template <class Fn>
inline void with_dtype(Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::kF32) {
    fn(std::integral_constant<Dtype, Dtype::kF32>{});
  } else if (dtype == Dtype::kBf16) {
    fn(std::integral_constant<Dtype, Dtype::kBf16>{});
  } else {
    fn(std::integral_constant<Dtype, Dtype::kF16>{});
  }
}

// e^x, about 1 ulp, for x in [-87, 88]; beyond it the value at the end of the range. 2^n e^f with |f| <= ln(2) / 2 and
// Taylor's polynomial of degree 7 for e^f.
inline F exp(F x) {
  x = min(set1(88.0f), max_or_nan(set1(-87.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const F shifted = fma(x, set1(1.44269504f), set1(12582912.0f));
  const F n = sub(shifted, set1(12582912.0f));
  const F f = fma(n, set1(1.42860677e-6f), fma(n, set1(-0.693145752f), x));
  F p = set1(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, f, set1(c));
  return as_float(add_i(bits_of(p), shift_left<23>(bits_of(shifted))));
}

inline float exp(float x) {
  alignas(64) float lanes[kVecLanes];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

inline float max_lane(F v) {
  alignas(64) float lanes[kVecLanes];
  store(lanes, v);
  float best = lanes[0];
  for (const float lane : lanes) best = lane > best ? lane : best;
  return best;
}

void add_norm(Dtype dtype, void* x, const void* y, const void* weight, float eps, int64_t n, void* out) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    F squares = zero();
    for (int64_t i = 0; i < n; i += kVecLanes) {
      F v = load_t<kType>(x, i);
      if (y) {
        v = round_t<kType>(add(v, load_t<kType>(y, i)));
        store_t<kType>(x, i, v);
      }
      squares = fma(v, v, squares);
    }
    const F scale = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kVecLanes) {
      const F normed = round_t<kType>(mul(load_t<kType>(x, i), scale));
      store_t<kType>(out, i, mul(normed, load_t<kType>(weight, i)));
    }
  });
}

// fp32 of x (n), zero up to whole vectors.
inline void widen(Dtype dtype, const void* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) store(out + i, load_as(x, dtype, i));
  if (i < n) store(out + i, load_tail(x, dtype, i, n - i));
}

void rotate(Dtype dtype, const void* x, const float* cos, const float* sin, int64_t dim, float* scratch, float* out) {
  const int64_t half = dim / 2, padded = (dim + kRowAlign - 1) / kRowAlign * kRowAlign;
  float* swapped = scratch + padded;
  widen(dtype, x, dim, scratch);
  __builtin_memcpy(swapped, scratch + half, half * sizeof(float));
  __builtin_memcpy(swapped + half, scratch, half * sizeof(float));
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t i = 0; i < dim; i += kVecLanes) {
      const F straight = round_t<kType>(mul(load(scratch + i), load(cos + i)));
      const F crossed = round_t<kType>(mul(load(swapped + i), load(sin + i)));
      store(out + i, round_t<kType>(add(straight, crossed)));
    }
  });
}

void silu_mul(Dtype dtype, void* gate, const void* up, int64_t n) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t i = 0; i < n; i += kVecLanes) {
      const F g = load_t<kType>(gate, i);
      const F s = round_t<kType>(div(g, add(set1(1.0f), exp(sub(zero(), g)))));
      store_t<kType>(gate, i, mul(s, load_t<kType>(up, i)));
    }
  });
}

void dense(Dtype dtype, const void* weight, const void* bias, const void* x, int64_t k, int64_t begin, int64_t end,
           void* out) {
  constexpr int kRows = 4;
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t n = begin; n < end; n += kRows) {
      F acc[kRows];
      const int64_t count = end - n < kRows ? end - n : kRows;
      int64_t row[kRows];
      for (int r = 0; r < kRows; ++r) {
        acc[r] = zero();
        row[r] = (n + (r < count ? r : 0)) * k;
      }
      int64_t i = 0;
      for (; i + kVecLanes <= k; i += kVecLanes) {
        const F v = load_t<kType>(x, i);
        unroll<kRows>([&](auto r) LOWBIT_INLINE { acc[r] = fma(load_t<kType>(weight, row[r] + i), v, acc[r]); });
      }
      if (i < k) {
        const F v = load_t<kType>(x, i);
        for (int r = 0; r < kRows; ++r) acc[r] = fma(load_tail(weight, kType, row[r] + i, k - i), v, acc[r]);
      }
      alignas(64) float y[kVecLanes] = {};
      for (int r = 0; r < kRows; ++r) y[r] = sum(acc[r]);
      if (bias) store(y, add(load(y), load_tail(bias, kType, n, count)));
      store_as(out, kType, n, y, count);
    }
  });
}

int64_t argmax(Dtype dtype, const void* x, int64_t n) {
  constexpr int64_t kBlock = 512;
  alignas(64) float values[kBlock];
  float best = -__builtin_inff();
  int64_t block = 0;
  const auto widen_block = [&](int64_t begin) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    widen(dtype, static_cast<const char*>(x) + begin * size_of(dtype), count, values);
    return count;
  };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = widen_block(begin);
    for (int64_t i = count; i % kVecLanes; ++i) values[i] = -__builtin_inff();
    F most = set1(-__builtin_inff());
    for (int64_t i = 0; i < count; i += kVecLanes) most = max_or_nan(load(values + i), most);
    const float found = max_lane(most);
    if (found > best) {
      best = found;
      block = begin;
    }
  }
  const int64_t count = widen_block(block);
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] == best) return block + i;
  }
  return 0;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
