// A step of AdamW on groups of 128 parameters whose states are FP8 with dynamic range expansion.
//
// Powers are exp2(k log2 x). A code is significand * 2^exponent, so its power is a product of two table entries that
// are made for each group; and FP8 is itself nearly a logarithm, so a logarithm becomes a code without the power in
// between. Values decode within 2^-20 + 2^-24 |log2(x / c)| of those of the reference, relative; codes are those of a
// number within 2^-13 of its, where FP8 rounds by up to 2^-4.
#pragma once

#include <type_traits>

#include "cpu/fp8/fp8-inl.h"
#include "cpu/optim/fp8_adamw.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// log2 of 0 .. 15; that of zero makes every power of it underflow.
constexpr float kLog2[16] = {-1e5f,        0.0f,         1.0f,         1.584962501f, 2.0f,         2.321928095f,
                             2.584962501f, 2.807354922f, 3.0f,         3.169925001f, 3.321928095f, 3.459431619f,
                             3.584962501f, 3.700439718f, 3.807354922f, 3.906890596f};
constexpr float kCount[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                              16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
constexpr float kTiny = 0x1p-100f;
constexpr uint32_t kTinyBits = 27u << 23;
constexpr float kMaxExponent = 256.0f;

// 2^t within 2 ulp, 0 below 2^-126.5, NaN for NaN: the Taylor polynomial of 2^f, |f| <= 1 / 2, remainder below 2^-22.9,
// times 2^n.
LOWBIT_INLINE inline F exp2_of(F t) {
  t = max_or_nan(set1(-127.0f), min(set1(127.0f), t));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const F shifted = add(t, set1(12582912.0f));
  const F f = sub(t, sub(shifted, set1(12582912.0f)));
  F p = fma(set1(1.54035304e-4f), f, set1(1.33335581e-3f));
  p = fma(p, f, set1(9.61812911e-3f));
  p = fma(p, f, set1(5.55041087e-2f));
  p = fma(p, f, set1(0.240226507f));
  p = fma(p, f, set1(0.693147181f));
  p = fma(p, f, set1(1.0f));
  // The shift drops everything but n + 127; n = -127 gives 0.
  return mul(p, as_float(shift_left<23>(add_i(bits_of(shifted), set1_i(127)))));
}

// x = 2^n (1 + f) for normal positive x, `least` <= 1 + f < 2 `least`.
struct Split {
  F n, f;
};
LOWBIT_INLINE inline Split split(F x, int32_t least) {
  const I bits = add_i(bits_of(x), set1_i(0x3F800000 - least));
  const F n = sub(to_float(shift_right<23>(bits)), set1(127.0f));
  return {n, sub(as_float(add_i(bit_and(bits, set1_i(0x7FFFFF)), set1_i(least))), set1(1.0f))};
}

// log2 of normal positive x within 2^-23 + 2^-24 |log2 x|: log2(1 + f) = 2 / ln 2 artanh(s), s = f / (2 + f), to s^7;
// with 1 + f between sqrt(1 / 2) and sqrt(2) the next term is below 2^-24.
LOWBIT_INLINE inline F log2_of(F x) {
  const Split x2 = split(x, 0x3F3504F3);
  const F s = div(x2.f, add(x2.f, set1(2.0f))), square = mul(s, s);
  F p = fma(set1(0.412198584f), square, set1(0.577078017f));
  p = fma(p, square, set1(0.961796694f));
  p = fma(p, square, set1(2.88539008f));
  return fma(p, s, x2.n);
}

// The same within 2^-17 |log2 x| + 2^-23: a polynomial for log2(1 + f) / f, 3 / 4 <= 1 + f < 3 / 2, of least largest
// relative error.
LOWBIT_INLINE inline F rough_log2(F x) {
  const Split x2 = split(x, 0x3F400000);
  F p = fma(set1(-0.152247295f), x2.f, set1(0.295143694f));
  p = fma(p, x2.f, set1(-0.369522989f));
  p = fma(p, x2.f, set1(0.481247485f));
  p = fma(p, x2.f, set1(-0.721170902f));
  p = fma(p, x2.f, set1(1.44269133f));
  return fma(p, x2.f, x2.n);
}

inline float first(F v) {
  alignas(64) float lanes[kVecLanes];
  store(lanes, v);
  return lanes[0];
}

template <Float8 T>
struct StateCodec {
  using f = Fp8<T>;
  static constexpr int kOne = 1 << f::kMantissa;  // of the exponent field
  static constexpr int kExponentBits = 7 - f::kMantissa;
  static constexpr float kLog2Max = T == Float8::kE4m3 ? 8.807354922f : 15.807354922f;
  static constexpr float kLog2Range = 2 * kLog2Max - 1;

  // |code| = significand * 2^(exponent - kBias - kMantissa), the significand an integer below 2 kOne.
  static I significand(I code) {
    const I hidden = bit_and(add_i(exponent_field(code), set1_i(0x80 - kOne)), set1_i(0x80));
    return add_i(bit_and(code, set1_i(kOne - 1)), shift_right<7 - f::kMantissa>(hidden));
  }
  static I exponent(I code) { return shift_right<f::kMantissa>(max_i(exponent_field(code), set1_i(kOne))); }
  static I exponent_field(I code) { return bit_and(code, set1_i(0x80 - kOne)); }

  // The code of 2^t, t < log2(kMax * 33 / 32), 0 for what is far below. Between powers of two codes grow as numbers do:
  // the code of w 2^e is kOne (w + e + kBias - 1), and below the smallest normal number that of w 2^(1 - kBias) is
  // kOne w. 2^r within 2^-18.5, 0 <= r < 1, by the polynomial of degree 4 of least largest relative error.
  LOWBIT_INLINE static I encode_log(F t) {
    const F e = floor_of(t), r = sub(t, e);
    F p = fma(set1(0.0135341678f), r, set1(0.0520114601f));
    p = fma(p, r, set1(0.241442755f));
    p = fma(p, r, set1(0.693003833f));
    p = fma(p, r, set1(1.00000262f));
    const F top = max_or_nan(set1(1 - f::kBias), e);
    const F w = shrink(p, sub(e, top));
    return nearest(fma(add(w, top), set1(kOne), set1(kOne * (f::kBias - 1))));
  }
};

// The values of a group's codes.
template <Float8 T, bool kExpand, bool kSigned>
struct Reader {
  struct None {
    explicit None(const float*) {}
  };
  template <int B>
  using Powers = std::conditional_t<kExpand, Table<B>, None>;
  alignas(64) float entries[16 + (1 << StateCodec<T>::kExponentBits)];
  F scale;
  Powers<4> of_significand;
  Powers<StateCodec<T>::kExponentBits> of_exponent;

  Reader(const float* terms, int64_t groups)
      : scale(set1(terms[0])), of_significand(fill(terms, groups)), of_exponent(entries + 16) {}

  // (significand 2^exponent)^(1 / k) times what all values have in common. The significand's power is at most 1 and
  // that of the exponent bears the rest: neither overflows, nor is cut to 0 where the value is not.
  const float* fill(const float* terms, int64_t groups) {
    if constexpr (kExpand) {
      const F inverse = div(set1(1.0f), set1(terms[groups])), center = set1(terms[2 * groups]);
      const F shift = set1(Fp8<T>::kMantissa + 1);
      for (int i = 0; i < 16; i += kVecLanes) {
        store(entries + i, exp2_of(mul(sub(load(kLog2 + i), shift), inverse)));
      }
      const F common = add(sub(log2_or_nan(scale), set1(Fp8<T>::kBias + Fp8<T>::kMantissa)), shift);
      for (int i = 0; i < 1 << StateCodec<T>::kExponentBits; i += kVecLanes) {
        const F exponent = add(load(kCount + i), common);
        store(entries + 16 + i, mul(exp2_of(mul(exponent, inverse)), center));
      }
    }
    return entries;
  }
  // `log2_of`, NaN for NaN.
  static F log2_or_nan(F x) { return add(log2_of(x), sub(x, x)); }

  LOWBIT_INLINE F operator()(I code) const {
    if constexpr (kExpand) {
      const I significand = StateCodec<T>::significand(code), exponent = StateCodec<T>::exponent(code);
      const F value = mul(of_significand(significand), of_exponent(exponent));
      if constexpr (!kSigned) return value;
      return as_float(select_bits(set1_i(INT32_MIN), shift_left<24>(code), bits_of(value)));
    } else {
      return mul(decode<T>(code), scale);
    }
  }
};

// The largest magnitude of a group, and the smallest that is not taken for zero.
struct Range {
  I most = set1_i(0), least = set1_i(-1);
  LOWBIT_INLINE void add_values(F v) {
    const I magnitude = magnitude_of(bits_of(v));
    most = max_i(most, magnitude);
    // Magnitudes below kTiny wrap around to the top.
    least = min_u(least, add_i(magnitude, set1_i(-static_cast<int32_t>(kTinyBits))));
  }
};

// Sets a group's terms and makes codes of its values.
template <Float8 T, bool kExpand, bool kSigned>
struct Writer {
  F factor = zero(), exponent = zero(), offset = zero();
  bool empty = false;  // all codes are 0
  Writer(const Range& range, float* terms, int64_t groups) {
    const uint32_t most = highest(range.most), least = lowest(range.least) + kTinyBits;
    float mx, mn, scale = 1.0f, k = 1.0f, center = 1.0f;
    __builtin_memcpy(&mx, &most, 4);
    __builtin_memcpy(&mn, &least, 4);
    if (most < kTinyBits) {
      empty = true;
    } else if (most >= 0x7F800000u) {
      empty = true;
      scale = __builtin_nanf("");
    } else if constexpr (kExpand) {
      const F distance = max_or_nan(set1(0x1p-20f), sub(log2_of(set1(mx)), log2_of(set1(mn))));
      const float steps = first(min(set1(16 * kMaxExponent), div(set1(16 * StateCodec<T>::kLog2Range), distance)));
      k = static_cast<float>(static_cast<int32_t>(steps)) * 0.0625f;
      const F middle = mul(root(set1(mx)), root(set1(mn)));
      center = first(middle);
      factor = div(set1(1.0f), middle);
      exponent = set1(k);
      const F log_scale = sub(mul(exponent, log2_of(mul(set1(mx), factor))), set1(StateCodec<T>::kLog2Max));
      offset = sub(zero(), log_scale);
      scale = first(exp2_of(log_scale));
    } else {
      scale = mx / Fp8<T>::kMax;
      factor = set1(scale);
    }
    terms[0] = scale;
    if constexpr (kExpand) {
      terms[groups] = k;
      terms[2 * groups] = center;
    }
  }
  LOWBIT_INLINE I operator()(F v) const {
    if constexpr (kExpand) {
      const F magnitude = kSigned ? as_float(magnitude_of(bits_of(v))) : v;
      const F t = fma(exponent, rough_log2(mul(magnitude, factor)), offset);
      const I code = StateCodec<T>::encode_log(keep_from(set1(kTiny), magnitude, t, set1(-1000.0f)));
      if constexpr (!kSigned) return code;
      return select_bits(set1_i(0x80), shift_right<24>(bits_of(v)), code);
    } else {
      return encode<T>(div(v, factor), Fp8<T>::kMaxCode, false);
    }
  }
};

template <class W>
inline void write_group(const W& writer, const float* values, int64_t count, uint8_t* codes) {
  if (writer.empty) {
    __builtin_memset(codes, 0, count);
    return;
  }
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) store_u8(codes + i, writer(load(values + i)));
  if (i < count) {
    uint8_t bytes[kVecLanes];
    store_u8(bytes, writer(load(values + i)));
    __builtin_memcpy(codes + i, bytes, count - i);
  }
}

// The first `count` codes at p, then zeros.
inline I load_some(const uint8_t* p, int64_t count) {
  if (count >= kVecLanes) return load_u8(p);
  uint8_t bytes[kVecLanes] = {};
  __builtin_memcpy(bytes, p, count);
  return load_u8(bytes);
}

template <Float8 M, Float8 V, bool kExpand>
inline void step_group(const Fp8AdamW& z, int64_t g) {
  const int64_t groups = ceil_div(z.numel, kStateGroup), at = g * kStateGroup, left = z.numel - at;
  const int64_t count = left < kStateGroup ? left : kStateGroup;
  uint8_t *m_codes = z.exp_avg.codes + at, *v_codes = z.exp_avg_sq.codes + at;
  float *m_terms = z.exp_avg.terms + g, *v_terms = z.exp_avg_sq.terms + g;
  const Reader<M, kExpand, true> read_m(m_terms, groups);
  const Reader<V, kExpand, false> read_v(v_terms, groups);
  const F beta1 = set1(z.beta1), rest1 = set1(z.rest1), beta2 = set1(z.beta2), rest2 = set1(z.rest2);
  const F decay = set1(z.decay), step_size = set1(-z.step_size), correction = set1(z.root_correction);
  const F eps = set1(z.eps);
  alignas(64) float ms[kStateGroup], vs[kStateGroup];
  Range m_range, v_range;
  for (int64_t i = 0; i < count; i += kVecLanes) {
    const int64_t here = count - i;
    const bool whole = here >= kVecLanes;
    const F grad = whole ? load_as(z.grad, z.dtype, at + i) : load_tail(z.grad, z.dtype, at + i, here);
    const F param = whole ? load_as(z.param, z.dtype, at + i) : load_tail(z.param, z.dtype, at + i, here);
    const F m = fma(beta1, read_m(load_some(m_codes + i, here)), mul(rest1, grad));
    const F v = fma(beta2, read_v(load_some(v_codes + i, here)), mul(mul(rest2, grad), grad));
    store(ms + i, m);
    store(vs + i, v);
    m_range.add_values(m);
    v_range.add_values(v);
    const F denominator = fma(root(v), correction, eps);
    const F updated = fma(step_size, div(m, denominator), mul(param, decay));
    if (whole && z.dtype == Dtype::kF32) {
      store(static_cast<float*>(z.param) + at + i, updated);
    } else {
      alignas(64) float lanes[kVecLanes];
      store(lanes, updated);
      store_as(z.param, z.dtype, at + i, lanes, whole ? kVecLanes : here);
    }
  }
  // Side by side: each is one long chain of operations that wait for each other.
  const Writer<M, kExpand, true> write_m(m_range, m_terms, groups);
  const Writer<V, kExpand, false> write_v(v_range, v_terms, groups);
  write_group(write_m, ms, count, m_codes);
  write_group(write_v, vs, count, v_codes);
}

template <Float8 M, Float8 V>
inline void step_groups(const Fp8AdamW& z, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    if (z.expand) {
      step_group<M, V, true>(z, g);
    } else {
      step_group<M, V, false>(z, g);
    }
  }
}

inline void fp8_adamw_groups(const Fp8AdamW& z, int64_t begin, int64_t end) {
  constexpr Float8 kE4m3 = Float8::kE4m3, kE5m2 = Float8::kE5m2;
  if (z.exp_avg.type == kE5m2) {
    z.exp_avg_sq.type == kE5m2 ? step_groups<kE5m2, kE5m2>(z, begin, end) : step_groups<kE5m2, kE4m3>(z, begin, end);
  } else {
    z.exp_avg_sq.type == kE5m2 ? step_groups<kE4m3, kE5m2>(z, begin, end) : step_groups<kE4m3, kE4m3>(z, begin, end);
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit

#define LOWBIT_EXPORT_FP8_ADAMW                                                            \
  namespace lowbit {                                                                       \
  void LOWBIT_CAT(fp8_adamw_, LOWBIT_ISA)(const Fp8AdamW& z, int64_t begin, int64_t end) { \
    LOWBIT_ISA::fp8_adamw_groups(z, begin, end);                                           \
  }                                                                                        \
  }
