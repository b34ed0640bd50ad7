// Counts of bits in plain C++.
#pragma once

#include <bit>

// clang-format off: the vectors come first
#include "cpu/simd/vec_scalar.h"
#include "cpu/weights/codecs-inl.h"
// clang-format on

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kSignRows = 4;
constexpr int kSignVecs = 1;
constexpr int64_t kCountChunks = INT64_MAX;  // dwords that `count` may add up before `total`

inline I xor_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline I sub_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I count(I sums, I bits) {
  return each<I>([&](int i) { return sums.v[i] + static_cast<uint32_t>(std::popcount(bits.v[i])); });
}
inline I total(I sums) { return sums; }
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) {
  uint32_t mask = 0;
  for (int i = 0; i < kVecLanes; ++i) mask |= (v.v[i] >= 0 ? 1u : 0u) << i;
  return mask;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
