#define LOWBIT_ISA avx512
#define LOWBIT_ISA_BIT kAvx512
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx512 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 && codec == Codec::kLut ? Cost{227, 0, 332, 4}
         : bits == 8                       ? Cost{85, 0, 100, 4}
                                           : Cost{38, 0, 83, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 && codec == Codec::kLut ? Cost{450, 415, 110, 6}
         : bits == 8                       ? Cost{226, 195, 109, 6}
                                           : Cost{158, 128, 109, 6};
}
}  // namespace
}  // namespace lowbit::avx512

#include "cpu/attention-inl.h"
#include "cpu/table-inl.h"
LOWBIT_EXPORT_TABLE(kF32Kernels)
LOWBIT_EXPORT_DECODER_OPS
