// The fp32 kernels: every codec in GEMV, GEMM and dequantize.
#pragma once

#include "cpu/weights/f32_any-inl.h"
#include "cpu/weights/gemv-inl.h"

#define LOWBIT_KERNELS(B) gemv_f32<Lut<B>>(LOWBIT_NAME("gemv", "f32", "lut" #B)), LOWBIT_PANEL_KERNELS_OF(B)
#define LOWBIT_PAIR_KERNELS(B) \
  gemv_f32<PairLut<B>>(LOWBIT_NAME("gemv", "f32", "pairlut" #B)), LOWBIT_PAIR_PANEL_KERNELS(B)

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <class C>
constexpr Kernel gemv_f32(const char* name) {
  Kernel kernel = gemm_f32<C>(name);
  kernel.chunk_groups = kernel.half_groups = true;
  kernel.rows_per_task = 0;
  kernel.run = gemv_run<ComputeF32<C>>;
  return kernel;
}

constexpr Kernel kF32Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_KERNELS)
                                      gemv_f32<Int8>(LOWBIT_NAME("gemv", "f32", "int8")),
                                  LOWBIT_PANEL_KERNELS(Int8, "int8") LOWBIT_FOREACH_PAIR_BITS(LOWBIT_PAIR_KERNELS)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
