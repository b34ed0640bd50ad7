// Activations in fp32, as plain loops that the compiler turns into the vectors of the instruction set.
// |error| <= 2^-20 |value| + 2^-125 |y| for silu, and <= 2^-21 |y| for both gelus.
#pragma once

#include "core/kernel.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// e^x within 2 ulp for x in [-87, 88], else that of the nearest end: x = n ln 2 + r, a Taylor polynomial in r
// (|r| <= ln 2 / 2, remainder below 2^-27), and n added to the exponent. NaN gives NaN.
inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  // The low bits of `shifted` are n; the shift drops the rest. n is -126 to 127 here.
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits + 127) << 23);
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float silu(float y) { return y / (1.0f + exp_of(-y)); }

// 0.5 y (1 + tanh(u)) = y / (1 + e^(-2u)), u = sqrt(2 / pi) (y + 0.044715 y^3).
inline float gelu_tanh(float y) { return y / (1.0f + exp_of(-1.59576912f * (y + 0.044715f * y * y * y))); }

// y Phi(y) with erfc from Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
inline float gelu(float y) {
  const float z = (y < 0 ? -y : y) * 0.707106781f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float lower = 0.5f * p * t * exp_of(-z * z), upper = 1.0f - lower;
  return y * (y < 0 ? lower : upper);
}

inline void activate(Activation activation, float* y, int64_t count) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      for (int64_t i = 0; i < count; ++i) y[i] = y[i] < 0 ? 0.0f : y[i];
      return;
    case Activation::kSilu:
      for (int64_t i = 0; i < count; ++i) y[i] = silu(y[i]);
      return;
    case Activation::kGelu:
      for (int64_t i = 0; i < count; ++i) y[i] = gelu(y[i]);
      return;
    case Activation::kGeluTanh:
      for (int64_t i = 0; i < count; ++i) y[i] = gelu_tanh(y[i]);
      return;
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
