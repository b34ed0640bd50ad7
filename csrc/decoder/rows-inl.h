// The row-wise functions of decoder_ops.h: norms, rotary embedding, activation, dense rows, argmax.
#pragma once

#include "cpu/weights/common-inl.h"
#include "decoder/ops.h"

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

// tanh(x): of e = e^2x - 1 it is e / (e + 2). With 2x = n ln(2) + f, e is 2^n (e^f - 1) + (2^n - 1), which keeps small
// x.
inline F tanh(F x) {
  x = min(set1(30.0f), max_or_nan(set1(-30.0f), add(x, x)));
  const F shifted = fma(x, set1(1.44269504f), set1(12582912.0f));
  const F n = sub(shifted, set1(12582912.0f));
  const F f = fma(n, set1(1.42860677e-6f), fma(n, set1(-0.693145752f), x));
  F p = set1(1.0f / 40320);
  for (const float c : {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) p = fma(p, f, set1(c));
  const F power = as_float(add_i(bits_of(set1(1.0f)), shift_left<23>(bits_of(shifted))));
  const F e = fma(power, mul(p, f), sub(power, set1(1.0f)));
  return div(e, add(e, set1(2.0f)));
}

inline float max_lane(F v) {
  alignas(64) float lanes[kVecLanes];
  store(lanes, v);
  float best = lanes[0];
  for (const float lane : lanes) best = lane > best ? lane : best;
  return best;
}

inline F norm_scale(const Norm& norm, F squares, int64_t n) {
  return set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + norm.eps));
}

template <Dtype kType>
inline F normed(const Norm& norm, F x, F scale, F weight) {
  const F v = mul(x, scale);
  return mul(norm.late ? v : round_t<kType>(v), weight);
}

void add_norm(const AddNorm& a) {
  with_dtype(a.norm.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    const void* y = a.y;
    if (y && a.y_norm) {
      F squares = zero();
      for (int64_t i = 0; i < a.n; i += kVecLanes) {
        const F v = load_t<kType>(y, i);
        squares = fma(v, v, squares);
      }
      const F scale = norm_scale(a.norm, squares, a.n);
      for (int64_t i = 0; i < a.n; i += kVecLanes) {
        store_t<kType>(a.out, i, normed<kType>(a.norm, load_t<kType>(y, i), scale, load(a.y_norm + i)));
      }
      // A NaN makes the padding NaN, which would stay in x.
      const int64_t left = (kVecLanes - a.n % kVecLanes) % kVecLanes;
      __builtin_memset(static_cast<char*>(a.out) + a.n * size_of(kType), 0, left * size_of(kType));
      y = a.out;
    }
    F squares = zero();
    for (int64_t i = 0; i < a.n; i += kVecLanes) {
      F v = load_t<kType>(a.x, i);
      if (y) {
        F addend = load_t<kType>(y, i);
        if (a.y_scale != 1.0f) addend = round_t<kType>(mul(addend, set1(a.y_scale)));
        v = round_t<kType>(add(v, addend));
        store_t<kType>(a.x, i, v);
      }
      squares = fma(v, v, squares);
    }
    const F scale = norm_scale(a.norm, squares, a.n);
    for (int64_t i = 0; i < a.n; i += kVecLanes) {
      store_t<kType>(a.out, i, normed<kType>(a.norm, load_t<kType>(a.x, i), scale, load(a.weight + i)));
    }
  });
}

// fp32 of x (n), zero up to whole vectors.
inline void widen(Dtype dtype, const void* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) store(out + i, load_as(x, dtype, i));
  if (i < n) store(out + i, load_tail(x, dtype, i, n - i));
}

void ready(const Head& h) {
  widen(h.norm.dtype, h.x, h.dim, h.out);
  with_dtype(h.norm.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    if (h.weight) {
      F squares = zero();
      for (int64_t i = 0; i < h.dim; i += kVecLanes) {
        const F v = load(h.out + i);
        squares = fma(v, v, squares);
      }
      const F scale = norm_scale(h.norm, squares, h.dim);
      for (int64_t i = 0; i < h.dim; i += kVecLanes) {
        store(h.out + i, round_t<kType>(normed<kType>(h.norm, load(h.out + i), scale, load(h.weight + i))));
      }
    }
    const int64_t half = h.rotary / 2;
    __builtin_memcpy(h.scratch, h.out + half, half * sizeof(float));
    __builtin_memcpy(h.scratch + half, h.out, half * sizeof(float));
    for (int64_t i = h.rotary; i % kVecLanes; ++i) h.scratch[i] = 0.0f;
    for (int64_t i = 0; i < h.rotary; i += kVecLanes) {
      const F straight = round_t<kType>(mul(load(h.out + i), load(h.cos + i)));
      const F crossed = round_t<kType>(mul(load(h.scratch + i), load(h.sin + i)));
      store(h.out + i, round_t<kType>(add(straight, crossed)));
    }
  });
}

void gate_mul(Activation activation, Dtype dtype, void* gate, const void* up, int64_t n) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t i = 0; i < n; i += kVecLanes) {
      F g = load_t<kType>(gate, i);
      if (activation == Activation::kSilu) {
        g = div(g, add(set1(1.0f), exp(sub(zero(), g))));
      } else {
        alignas(64) float lanes[kVecLanes];
        store(lanes, g);
        activate(activation, lanes, kVecLanes);
        g = load(lanes);
      }
      store_t<kType>(gate, i, mul(round_t<kType>(g), load_t<kType>(up, i)));
    }
  });
}

void scale(Dtype dtype, void* x, float factor, int64_t n) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t i = 0; i < n; i += kVecLanes) store_t<kType>(x, i, mul(load_t<kType>(x, i), set1(factor)));
  });
}

void cap_logits(Dtype dtype, void* x, float divisor, float cap, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    for (int64_t i = begin; i < end; i += kVecLanes) {
      const int64_t count = end - i < kVecLanes ? end - i : kVecLanes;
      F v = count < kVecLanes ? load_tail(x, kType, i, count) : load_t<kType>(x, i);
      if (divisor != 1.0f) v = round_t<kType>(div(v, set1(divisor)));
      if (cap != 0.0f) v = mul(round_t<kType>(tanh(round_t<kType>(div(v, set1(cap))))), set1(cap));
      alignas(64) float values[kVecLanes];
      store(values, v);
      store_as(x, kType, i, values, count);
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
