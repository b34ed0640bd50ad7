#define LOWBIT_ISA avx512vnni
#define LOWBIT_ISA_BIT kAvx512Vnni
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/bytes_avx512.h"
// clang-format on

namespace lowbit::avx512vnni {
namespace {
constexpr Cost skinny_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{21, 2, 18, 8}; }
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{40, 15, 14, 6}; }
}  // namespace
}  // namespace lowbit::avx512vnni

#include "cpu/int8-inl.h"
LOWBIT_EXPORT_TABLE(kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(avx512vnni)
