#define LOWBIT_ISA avx512bf16
#define LOWBIT_ISA_BIT kAvx512Bf16
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx512bf16 {
namespace {
constexpr Cost gemv_cost(int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{83, 0, 105, 4} : Cost{31, 0, 80, 4};
}
constexpr Cost gemm_cost(int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{80, 68, 122, 6} : Cost{51, 28, 113, 6};
}
}  // namespace
}  // namespace lowbit::avx512bf16

#include "cpu/f16-inl.h"
LOWBIT_EXPORT_TABLE_OF(avx512bf16_f16, kF16Kernels)
