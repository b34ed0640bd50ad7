#define LOWBIT_ISA avx512
#define LOWBIT_ISA_BIT kAvx512
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 5.
namespace lowbit::avx512 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 && codec == Codec::kLut ? Cost{165, 300, 155, 4}
         : bits == 8                       ? Cost{48, 12, 35, 4}
                                           : Cost{26, 37, 34, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 && codec == Codec::kLut ? Cost{240, 225, 46, 6} : Cost{100, 95, 47, 6};
}
}  // namespace
}  // namespace lowbit::avx512

#include "cpu/attention-inl.h"
#include "cpu/table-inl.h"
LOWBIT_EXPORT_TABLE(kF32Kernels)
LOWBIT_EXPORT_DECODER_OPS
