// The FP8 codecs: floats to codes, to nearest even or with noise, codes to floats, and scales of blocks; bit for bit
// as python/lowbit/reference/fp8.py states them. The lanes of an I hold codes.
#pragma once

#include "cpu/fp8/fp8.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int32_t kInfinityBits = 0x7F800000, kNanBits = 0x7FC00000, kNanCode = 0x7F;

template <Float8 T>
struct Fp8 {
  static constexpr bool kE4 = T == Float8::kE4m3;
  static constexpr int kMantissa = kE4 ? 3 : 2;
  static constexpr int kDropped = 23 - kMantissa;  // mantissa bits that fp32 has and the code has not
  static constexpr int kBias = kE4 ? 7 : 15;
  static constexpr int kEmax = kE4 ? 8 : 15;
  static constexpr int kRebias = 127 - kBias;
  static constexpr int32_t kMinNormal = (kRebias + 1) << 23;  // bits of it in fp32
  static constexpr int32_t kMaxCode = kE4 ? 0x7E : 0x7B;
  static constexpr int32_t kOverflow = kE4 ? 0x7F : 0x7C;
  static constexpr float kMax = kE4 ? 448.0f : 57344.0f;
  // The float whose last bit is worth the step of subnormal codes.
  static constexpr int32_t kStepBits = (kRebias + 1 - kMantissa + 23) << 23;
  // 1 / that step, times 2^kDropped.
  static constexpr float kFixedPoint = kE4 ? 0x1p29f : 0x1p37f;
};

inline I magnitude_of(I bits) { return bit_and(bits, set1_i(0x7FFFFFFF)); }

// `code` with the sign of v, or the NaN without one.
inline I with_sign(I code, I bits, I magnitude, bool nan_has_sign) {
  const I sign = bit_and(shift_right<24>(bits), set1_i(0x80));
  const I infinity = set1_i(kInfinityBits), nan = set1_i(kNanCode);
  return nan_has_sign ? or_i(if_less(infinity, magnitude, nan, code), sign)
                      : if_less(infinity, magnitude, nan, or_i(code, sign));
}

// To nearest even. `top` is the code of all that is larger than the codes below it.
template <Float8 T>
inline I encode(F v, int32_t top, bool nan_has_sign) {
  using f = Fp8<T>;
  const I bits = bits_of(v), magnitude = magnitude_of(bits);
  const I odd = bit_and(shift_right<f::kDropped>(magnitude), set1_i(1));
  const I up = add_i(add_i(magnitude, set1_i((1 << (f::kDropped - 1)) - 1)), odd);
  const I normal = sub_i(shift_right<f::kDropped>(up), set1_i(f::kRebias << f::kMantissa));
  const I step = set1_i(f::kStepBits);
  const I subnormal = sub_i(bits_of(add(as_float(magnitude), as_float(step))), step);
  const I code = if_less(magnitude, set1_i(f::kMinNormal), subnormal, normal);
  return with_sign(min_i(code, set1_i(top)), bits, magnitude, nan_has_sign);
}

// Adds noise, 32 uniform bits, to what the code drops, and cuts off.
template <Float8 T>
inline I encode_stochastic(F v, I noise) {
  using f = Fp8<T>;
  const I bits = bits_of(v), magnitude = magnitude_of(bits);
  const I uniform = shift_right<32 - f::kDropped>(noise);
  // Infinity and NaN stay below the sign bit: noise is less than a step.
  const I normal = sub_i(shift_right<f::kDropped>(add_i(magnitude, uniform)), set1_i(f::kRebias << f::kMantissa));
  const I fixed = truncated(mul(as_float(magnitude), set1(f::kFixedPoint)));
  const I subnormal = shift_right<f::kDropped>(add_i(fixed, uniform));
  const I code = if_less(magnitude, set1_i(f::kMinNormal), subnormal, normal);
  return with_sign(min_i(code, set1_i(f::kMaxCode)), bits, magnitude, false);
}

template <Float8 T>
inline F decode(I code) {
  using f = Fp8<T>;
  const I magnitude = bit_and(code, set1_i(0x7F)), mantissa = shift_left<f::kDropped>(magnitude);
  const I normal = add_i(mantissa, set1_i(f::kRebias << 23));
  const F one = as_float(set1_i(f::kMinNormal));
  const I subnormal = bits_of(sub(as_float(add_i(mantissa, set1_i(f::kMinNormal))), one));
  const I finite = if_less(magnitude, set1_i(1 << f::kMantissa), subnormal, normal);
  // Infinity and NaN: the exponent of fp32 is full as well.
  const I all = if_less(set1_i(f::kMaxCode), magnitude, add_i(normal, set1_i(f::kRebias << 23)), finite);
  return as_float(or_i(all, shift_left<24>(bit_and(code, set1_i(0x80)))));
}

// Scales in fp32 of blocks with these maxima, rounded to what `type` stores.
template <Float8 T>
inline F make_scales(I maxima, ScaleType type) {
  using f = Fp8<T>;
  if (type == ScaleType::kE8m0) {
    const I exponent = sub_i(shift_right<23>(maxima), set1_i(f::kEmax));
    const I code = min_i(max_i(exponent, set1_i(0)), set1_i(254));
    // 2^-127 is subnormal.
    const I value = if_less(set1_i(0), code, shift_left<23>(code), set1_i(1 << 22));
    return as_float(if_less(set1_i(kInfinityBits - 1), maxima, set1_i(kNanBits), value));
  }
  I bits = bits_of(div(as_float(maxima), set1(f::kMax)));
  if (type == ScaleType::kBf16) {
    bits = bit_and(add_i(min_i(bits, set1_i(kNanBits)), set1_i(0xFFFF)), set1_i(~0xFFFF));
  }
  return as_float(if_less(set1_i(0), bits, bits, set1_i(0x3F800000)));
}

// Stores the first `count` of scales that `make_scales` has rounded.
inline void store_scales(void* scales, ScaleType type, int64_t at, F values, int64_t count) {
  alignas(64) char bytes[kVecLanes * 4];
  const int64_t size = type == ScaleType::kF32 ? 4 : type == ScaleType::kBf16 ? 2 : 1;
  char* out = static_cast<char*>(scales) + at * size;
  void* to = count == kVecLanes ? out : bytes;
  if (type == ScaleType::kF32) {
    store(static_cast<float*>(to), values);
  } else if (type == ScaleType::kBf16) {
    store_bf16(static_cast<uint16_t*>(to), values);
  } else {
    store_u8(static_cast<uint8_t*>(to), shift_right<23>(bits_of(values)));  // NaN has a full exponent
  }
  if (count < kVecLanes) __builtin_memcpy(out, bytes, count * size);
}

// Bits in fp32 of a power of two of E8M0; 0 is 2^-127, a subnormal, and 255 is NaN.
LOWBIT_INLINE constexpr uint32_t e8m0_bits(uint32_t code) {
  return code == 255 ? uint32_t{kNanBits} : code == 0 ? 1u << 22 : code << 23;
}
struct E8m0Bits {
  uint32_t of[256] = {};
  constexpr E8m0Bits() {
    for (uint32_t code = 0; code < 256; ++code) of[code] = e8m0_bits(code);
  }
};
constexpr E8m0Bits kE8m0Bits;

inline float load_scale(const void* scales, ScaleType type, int64_t i) {
  if (type == ScaleType::kF32) return static_cast<const float*>(scales)[i];
  const uint32_t bits = type == ScaleType::kBf16 ? uint32_t{static_cast<const uint16_t*>(scales)[i]} << 16
                                                 : kE8m0Bits.of[static_cast<const uint8_t*>(scales)[i]];
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// "lowbias32" (Wellons, hash prospector).
inline uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x7FEB352Du;
  h = (h ^ h >> 15) * 0x846CA68Bu;
  return h ^ h >> 16;
}
inline I mix(I h) {
  h = mul_i(xor_i(h, shift_right<16>(h)), set1_i(0x7FEB352D));
  h = mul_i(xor_i(h, shift_right<15>(h)), set1_i(static_cast<int32_t>(0x846CA68Bu)));
  return xor_i(h, shift_right<16>(h));
}

alignas(64) constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Noise of one row.
struct RowNoise {
  I a, b;
  RowNoise(uint64_t seed, int64_t row) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    const uint32_t key = mix(static_cast<uint32_t>(row) + mix(high ^ mix(low)));
    a = set1_i(static_cast<int32_t>(key));
    b = set1_i(static_cast<int32_t>(mix(key ^ 0x9E3779B9u)));
  }
  I at(int64_t column) const {
    const I columns = add_i(load_i(kLanes), set1_i(static_cast<int32_t>(column)));
    return mix(add_i(mix(xor_i(columns, a)), b));
  }
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
