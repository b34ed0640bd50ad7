// The kernels of the fp32 families for one instruction set: every codec in GEMV, GEMM and dequantize.
#pragma once

#include "core/costs.h"
#include "cpu/weights/gemv-inl.h"
#include "cpu/weights/panel-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <class C>
[[maybe_unused]] constexpr Kernel gemv_f32(const char* name) {
  return {name,
          Op::kLinear,
          Dtype::kF32,
          C::kCodec,
          C::kBits,
          C::kScope,
          LOWBIT_ISA_BIT,
          true,
          {true, true, true, false},
          f32_gemv_cost(LOWBIT_ISA_BIT, C::kBits, C::kCodec),
          prepare_f32,
          0,
          gemv_run<ComputeF32<C>>,
          kChunkK,
          1,
          false,
          true};
}
template <class C>
constexpr Kernel gemm_f32(const char* name) {
  return {name,
          Op::kLinear,
          Dtype::kF32,
          C::kCodec,
          C::kBits,
          C::kScope,
          LOWBIT_ISA_BIT,
          false,
          {true, true, true, false},
          f32_gemm_cost(LOWBIT_ISA_BIT, C::kBits, C::kCodec),
          prepare_f32,
          kRowsPerTask,
          gemm_run<C>};
}
template <class C>
constexpr Kernel dequantize_f32(const char* name) {
  return {name,  Op::kDequantize,           Dtype::kF32, C::kCodec, C::kBits, C::kScope,        LOWBIT_ISA_BIT,
          false, {true, true, true, false}, {},          nullptr,   0,        dequantize_run<C>};
}

#define LOWBIT_KERNELS(B)                                                 \
  LOWBIT_GEMV(Lut<B>, "lut" #B)                                           \
  gemm_f32<Lut<B>>(LOWBIT_NAME("gemm", "f32", "lut" #B)),                 \
      gemm_f32<ColumnLut<B>>(LOWBIT_NAME("gemm", "f32", "columnlut" #B)), \
      dequantize_f32<Lut<B>>(LOWBIT_NAME("dequantize", "f32", "lut" #B)), \
      dequantize_f32<ColumnLut<B>>(LOWBIT_NAME("dequantize", "f32", "columnlut" #B)),
#ifdef LOWBIT_NO_GEMV
#define LOWBIT_GEMV(codec, name)
#else
#define LOWBIT_GEMV(codec, name) gemv_f32<codec>(LOWBIT_NAME("gemv", "f32", name)),
#endif

const Kernel kF32Kernels[] = {
    LOWBIT_FOREACH_BITS(LOWBIT_KERNELS) LOWBIT_GEMV(Int8, "int8") gemm_f32<Int8>(LOWBIT_NAME("gemm", "f32", "int8")),
    dequantize_f32<Int8>(LOWBIT_NAME("dequantize", "f32", "int8")),
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
