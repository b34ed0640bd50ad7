// What FP8 states need beside the vectors in plain C++.
#pragma once

#include "cpu/codecs-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline I load_bytes(const uint8_t* p) {
  return each<I>([&](int i) { return p[i]; });
}
// The low byte of each lane.
inline void store_bytes(uint8_t* p, I v) {
  for (int i = 0; i < kVecLanes; ++i) p[i] = static_cast<uint8_t>(v.v[i]);
}
inline F root(F v) {
  return each<F>([&](int i) { return __builtin_sqrtf(v.v[i]); });
}
inline I min_u(I a, I b) {
  return each<I>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// v where x is at least `bound`, 0 elsewhere.
inline F keep_from(F bound, F x, F v) {
  return each<F>([&](int i) { return x.v[i] >= bound.v[i] ? v.v[i] : 0.0f; });
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
