#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
#include "cpu/vec_avx2.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 5.
namespace lowbit::avx2 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits >= 6 && codec == Codec::kLut ? Cost{285, 0, 345, 4} : Cost{64, 0, 90, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits >= 6 && codec == Codec::kLut ? Cost{430, 390, 90, 6} : Cost{180, 130, 90, 6};
}
}  // namespace
}  // namespace lowbit::avx2

#include "cpu/attention-inl.h"
#include "cpu/table-inl.h"
LOWBIT_EXPORT_TABLE(kF32Kernels)
LOWBIT_EXPORT_DECODER_OPS
