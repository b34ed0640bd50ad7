// The fp32 kernels of plain C++: GEMM, which serves every M as there are no registers to keep sums in, and dequantize.
#pragma once

#include "cpu/weights/panel-inl.h"

// Those of a codec, and of all codecs of a width.
#define LOWBIT_PANEL_KERNELS(C, codec) \
  gemm_f32<C>(LOWBIT_NAME("gemm", "f32", codec)), dequantize_f32<C>(LOWBIT_NAME("dequantize", "f32", codec)),
#define LOWBIT_PANEL_KERNELS_OF(B)       \
  LOWBIT_PANEL_KERNELS(Lut<B>, "lut" #B) \
  LOWBIT_PANEL_KERNELS(ColumnLut<B>, "columnlut" #B)
#define LOWBIT_PAIR_PANEL_KERNELS(B) LOWBIT_PANEL_KERNELS(PairLut<B>, "pairlut" #B)

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <class C>
constexpr Kernel gemm_f32(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kF32,
          .codec = C::kCodec,
          .bits = C::kBits,
          .scope = C::kScope,
          .isa = LOWBIT_ISA_BIT,
          .exact_x = kFloatInputs,
          .prepare = prepare_f32,
          .rows_per_task = kRowsPerTask,
          .run = gemm_run<C>};
}
template <class C>
constexpr Kernel dequantize_f32(const char* name) {
  Kernel kernel = gemm_f32<C>(name);
  kernel.op = Op::kDequantize;
  kernel.prepare = nullptr;
  kernel.rows_per_task = 0;
  kernel.run = dequantize_run<C>;
  return kernel;
}

constexpr Kernel kPanelKernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_PANEL_KERNELS_OF) LOWBIT_PANEL_KERNELS(Int8, "int8")
                                        LOWBIT_FOREACH_PAIR_BITS(LOWBIT_PAIR_PANEL_KERNELS)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
