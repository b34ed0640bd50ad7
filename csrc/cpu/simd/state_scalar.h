// What FP8 states need beside the vectors in plain C++.
#pragma once

#include "cpu/simd/fp8_scalar.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline F root(F v) {
  return each<F>([&](int i) { return __builtin_sqrtf(v.v[i]); });
}
inline I min_u(I a, I b) {
  return each<I>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return each<F>([&](int i) { return x.v[i] >= bound.v[i] ? v.v[i] : other.v[i]; });
}
// Of values below 2^22, as the two that follow.
inline F floor_of(F v) {
  return each<F>([&](int i) {
    const float near = (v.v[i] + 12582912.0f) - 12582912.0f;
    return near > v.v[i] ? near - 1.0f : near;
  });
}
// To nearest even.
inline I nearest(F v) {
  return each<I>([&](int i) { return to_bits(v.v[i] + 12582912.0f) - 0x4B400000u; });
}
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F shrink(F v, F n) {
  return each<F>([&](int i) {
    const float e = n.v[i] < -126.0f ? -126.0f : n.v[i];
    return v.v[i] * from_bits(static_cast<uint32_t>(static_cast<int32_t>(e) + 127) << 23);
  });
}
// The largest lane, each below 2^31.
inline uint32_t highest(I v) {
  uint32_t m = 0;
  for (uint32_t lane : v.v) m = lane > m ? lane : m;
  return m;
}
inline uint32_t lowest(I v) {
  uint32_t m = UINT32_MAX;
  for (uint32_t lane : v.v) m = lane < m ? lane : m;
  return m;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
