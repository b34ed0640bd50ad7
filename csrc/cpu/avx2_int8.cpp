#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/bytes_avx2.h"
// clang-format on

namespace lowbit::avx2 {
namespace {
constexpr Cost skinny_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{40, 10, 60, 4}; }
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{80, 40, 50, 4}; }
}  // namespace
}  // namespace lowbit::avx2

#include "cpu/int8-inl.h"
LOWBIT_EXPORT_TABLE_OF(avx2_int8, kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(avx2)
