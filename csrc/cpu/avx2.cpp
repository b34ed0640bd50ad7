#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
#include "cpu/vec_avx2.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx2 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits >= 6 && codec == Codec::kLut ? Cost{424, 0, 479, 4}
         : bits == 8                       ? Cost{94, 0, 190, 4}
                                           : Cost{80, 0, 163, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits >= 6 && codec == Codec::kLut ? Cost{600, 530, 118, 6}
         : bits == 8                       ? Cost{285, 220, 115, 6}
                                           : Cost{236, 175, 115, 6};
}
}  // namespace
}  // namespace lowbit::avx2

#include "cpu/attention-inl.h"
#include "cpu/table-inl.h"
LOWBIT_EXPORT_TABLE(kF32Kernels)
LOWBIT_EXPORT_DECODER_OPS
