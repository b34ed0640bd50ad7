// NaN and infinity in memory, by the bits of numbers. Only translation units compiled for the baseline include it.
#pragma once

#include <cstdint>

#include "core/kernel.h"

namespace lowbit {

// Calls fn(elements as unsigned integers, the bits of infinity) for fp32, bf16 or fp16 numbers.
template <class Fn>
auto with_bits(const void* p, Dtype dtype, const Fn& fn) {
  if (dtype == Dtype::kF32) return fn(static_cast<const uint32_t*>(p), uint32_t{0x7F800000});
  return fn(static_cast<const uint16_t*>(p), static_cast<uint16_t>(dtype == Dtype::kBf16 ? 0x7F80 : 0x7C00));
}

inline bool all_finite(const void* p, Dtype dtype, int64_t begin, int64_t end) {
  return with_bits(p, dtype, [&](const auto* bits, auto infinity) {
    decltype(infinity) special = 0;
    // No branch in the loop: the compiler makes vectors of it.
    for (int64_t i = begin; i < end; ++i) special |= (bits[i] & infinity) == infinity;
    return special == 0;
  });
}

inline bool any_nan(const void* p, Dtype dtype, int64_t begin, int64_t end) {
  return with_bits(p, dtype, [&](const auto* bits, auto infinity) {
    using Bits = decltype(infinity);
    constexpr Bits kMagnitude = static_cast<Bits>(-1) >> 1;
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) found |= static_cast<Bits>(bits[i] & kMagnitude) > infinity;
    return found != 0;
  });
}

}  // namespace lowbit
