#define LOWBIT_ISA avx512bf16
#define LOWBIT_ISA_BIT kAvx512Bf16
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx512bf16 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{44, 38, 39, 4} : Cost{17, 0, 39, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{80, 20, 56, 6} : Cost{55, 12, 56, 6};
}
}  // namespace
}  // namespace lowbit::avx512bf16

#include "cpu/bf16-inl.h"
LOWBIT_EXPORT_TABLE(kBf16Kernels)
