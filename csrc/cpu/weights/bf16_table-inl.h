// The kernels for bf16 activations with AVX-512 BF16.
#pragma once

#include "cpu/weights/bf16_int8-inl.h"
#include "cpu/weights/columns-inl.h"

#define LOWBIT_KERNELS(B)                                                                                   \
  gemv_bf16<B>(LOWBIT_NAME("gemv", "bf16", "lut" #B)), gemm_bf16<B>(LOWBIT_NAME("gemm", "bf16", "lut" #B)), \
      columns_bf16<B>(LOWBIT_NAME("columns", "bf16", "columnlut" #B)),
#define LOWBIT_PAIR_KERNELS(B)                                  \
  pair_gemv_bf16<B>(LOWBIT_NAME("gemv", "bf16", "pairlut" #B)), \
      pair_gemm_bf16<B>(LOWBIT_NAME("gemm", "bf16", "pairlut" #B)),

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr Kernel kBf16Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_KERNELS)
                                       gemv_bf16_int8(LOWBIT_NAME("gemv", "bf16", "int8")),
                                   LOWBIT_FOREACH_PAIR_BITS(LOWBIT_PAIR_KERNELS)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
