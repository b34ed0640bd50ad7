#define LOWBIT_ISA avx512bf16
#define LOWBIT_ISA_BIT kAvx512Bf16
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 5.
namespace lowbit::avx512bf16 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{38, 77, 42, 4} : Cost{21, 22, 19.5f, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{107, 79, 26, 6} : Cost{48, 45, 26, 6};
}
}  // namespace
}  // namespace lowbit::avx512bf16

#include "cpu/bf16-inl.h"
LOWBIT_EXPORT_TABLE(kBf16Kernels)
