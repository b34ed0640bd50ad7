// What FP8 needs of plain vectors beyond vec_scalar.h.
#pragma once

#include "cpu/simd/vec_scalar.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline I sub_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I mul_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] * b.v[i]; });
}
inline I xor_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline I or_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] | b.v[i]; });
}
inline bool less(uint32_t a, uint32_t b) { return static_cast<int32_t>(a) < static_cast<int32_t>(b); }
inline I min_i(I a, I b) {
  return each<I>([&](int i) { return less(b.v[i], a.v[i]) ? b.v[i] : a.v[i]; });
}
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) {
  return each<I>([&](int i) { return less(a.v[i], b.v[i]) ? yes.v[i] : no.v[i]; });
}
// 0 for what no int32 holds.
inline I truncated(F f) {
  return each<I>([&](int i) {
    const bool fits = f.v[i] > -2147483648.0f && f.v[i] < 2147483648.0f;
    return static_cast<uint32_t>(fits ? static_cast<int32_t>(f.v[i]) : 0);
  });
}

// The low byte of every lane.
inline void store_u8(uint8_t* p, I a) {
  for (int i = 0; i < kVecLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
struct E4m3Values {
  float of[256] = {};
  constexpr E4m3Values() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15;
      float v = static_cast<float>(code % 8 + (exponent ? 8 : 0)) * 0x1p-17f;
      for (int e = 1; e < exponent; ++e) v *= 2;
      of[code] = code & 128 ? -v : v;
    }
  }
};
constexpr E4m3Values kE4m3Values;
inline F load_e4m3_256th(const uint8_t* p) {
  return each<F>([&](int i) { return kE4m3Values.of[p[i]]; });
}
inline I load_u8(const uint8_t* p) {
  return each<I>([&](int i) { return uint32_t{p[i]}; });
}

// Lane i is the largest lane of v[i].
inline I max_of_each(const I* v) {
  return each<I>([&](int i) {
    uint32_t largest = v[i].v[0];
    for (uint32_t lane : v[i].v) largest = less(largest, lane) ? lane : largest;
    return largest;
  });
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
