#define LOWBIT_ISA avx512bf16
#define LOWBIT_ISA_BIT kAvx512Bf16
#include "cpu/vec_avx512.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx512bf16 {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return codec == Codec::kInt ? Cost{25, 0, 76, 4} : bits == 8 ? Cost{44, 38, 39, 4} : Cost{17, 0, 39, 4};
}
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) {
  return bits == 8 ? Cost{80, 20, 56, 6} : Cost{55, 12, 56, 6};
}
constexpr Cost columns_cost(int bits) { return bits == 8 ? Cost{190, 150, 75, 4} : Cost{40, 20, 42, 4}; }
}  // namespace
}  // namespace lowbit::avx512bf16

#include "cpu/attention-inl.h"
#include "cpu/bf16_int8-inl.h"
#include "cpu/columns-inl.h"

#define LOWBIT_ROWS(B)                                                                                      \
  gemv_bf16<B>(LOWBIT_NAME("gemv", "bf16", "lut" #B)), gemm_bf16<B>(LOWBIT_NAME("gemm", "bf16", "lut" #B)), \
      columns_bf16<B>(LOWBIT_NAME("columns", "bf16", "columnlut" #B)),

namespace lowbit::avx512bf16 {
namespace {
const Kernel kBf16Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_ROWS) gemv_bf16_int8(LOWBIT_NAME("gemv", "bf16", "int8"))};
}  // namespace
}  // namespace lowbit::avx512bf16
LOWBIT_EXPORT_TABLE(kBf16Kernels)
LOWBIT_EXPORT_DECODER_OPS
