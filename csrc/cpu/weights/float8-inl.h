// Weights that are FP8: decoded by arithmetic, where tables of 256 entries would take a load for each.
#pragma once

#include <cstddef>

#include "cpu/fp8/fp8_f16c-inl.h"
#include "cpu/weights/bytes_gemv-inl.h"
#include "cpu/weights/panel-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <Float8 T>
constexpr Codec kCodecOf = T == Float8::kE4m3 ? Codec::kE4m3 : Codec::kE5m2;

// Bytes 0 and 2 of a column's dword are weights k and k + 1 of 4, bytes 1 and 3 the next two.
template <Float8 T>
struct Float8Words {
  static constexpr int kBits = 8;
  static constexpr int kSums = 2;
  static constexpr int kRowsOfTwo = 2;
  explicit Float8Words(const Launch&) {}
  static std::nullptr_t at(const Launch&, int64_t, int64_t, int) { return nullptr; }
  template <int, int kRows, int kParts>
  LOWBIT_INLINE void step(I codes, std::nullptr_t, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    const I first = words_of<T>(_mm256_slli_epi16(codes, 8));
    const I second = words_of<T>(bit_and(codes, _mm256_set1_epi16(static_cast<int16_t>(0xFF00))));
    const F first_sums[] = {low_halves(first), high_halves(first)};
    const F second_sums[] = {low_halves(second), high_halves(second)};
    unroll<kSums>([&](auto s) LOWBIT_INLINE {
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        acc[0][r][s] = fma(first_sums[s], broadcast_pair(x[r]), acc[0][r][s]);
        acc[kParts - 1][r][s] = fma(second_sums[s], broadcast_pair(x[r] + 2), acc[kParts - 1][r][s]);
      });
    });
  }
  static F reduce(const F (&sums)[kSums]) {
    const I columns = _mm256_permute4x64_epi64(bits_of(_mm256_hadd_ps(sums[0], sums[1])), 0xD8);
    return mul(as_float(columns), set1(kWordFactor<T>));
  }
};

// For panels.
template <Float8 T>
struct Float8Codec {
  static constexpr int kBits = 8;
  explicit Float8Codec(const Launch&) {}
  const float* at(int64_t, int64_t, int) const { return nullptr; }
  template <int S>
  LOWBIT_INLINE F value(const uint8_t* block, const float*) const {
    return decode<T>(code_of<8, S>(block));
  }
};

template <Float8 T>
constexpr Kernel linear_kernel(const char* name, bool chunk_groups, int64_t rows_per_task,
                               void (*run)(const Launch&, int64_t, int64_t)) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kF32,
          .codec = kCodecOf<T>,
          .bits = 8,
          .scope = Scope::kShared,
          .isa = LOWBIT_ISA_BIT,
          .chunk_groups = chunk_groups,
          .exact_x = kFloatInputs,
          .prepare = prepare_f32,
          .rows_per_task = rows_per_task,
          .run = run,
          .half_groups = chunk_groups};
}
template <Float8 T>
constexpr Kernel gemv(const char* name) {
  return linear_kernel<T>(name, true, 0, bytes_run<Float8Words<T>>);
}
template <Float8 T>
constexpr Kernel gemm(const char* name) {
  return linear_kernel<T>(name, false, kRowsPerTask, gemm_run<Float8Codec<T>>);
}
template <Float8 T>
constexpr Kernel dequantize(const char* name) {
  Kernel kernel = linear_kernel<T>(name, false, 0, dequantize_run<Float8Codec<T>>);
  kernel.op = Op::kDequantize;
  kernel.prepare = nullptr;
  return kernel;
}

constexpr Kernel kFloat8Kernels[] = {
    gemv<Float8::kE4m3>(LOWBIT_NAME("gemv", "f32", "e4m3")),
    gemv<Float8::kE5m2>(LOWBIT_NAME("gemv", "f32", "e5m2")),
    gemm<Float8::kE4m3>(LOWBIT_NAME("gemm", "f32", "e4m3")),
    gemm<Float8::kE5m2>(LOWBIT_NAME("gemm", "f32", "e5m2")),
    dequantize<Float8::kE4m3>(LOWBIT_NAME("dequantize", "f32", "e4m3")),
    dequantize<Float8::kE5m2>(LOWBIT_NAME("dequantize", "f32", "e5m2")),
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
