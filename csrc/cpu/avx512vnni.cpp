#define LOWBIT_ISA avx512vnni
#define LOWBIT_ISA_BIT kAvx512Vnni
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/bytes_avx512.h"
// clang-format on

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx512vnni {
namespace {
constexpr Cost skinny_cost(int bits, Codec codec) {
  const float pass = codec == Codec::kLut ? 45.0f : 40.0f;
  return bits == 8   ? Cost{75, 20, codec == Codec::kLut ? 52.0f : 44.0f, 8}
         : bits == 6 ? Cost{60, 5, 52, 8}
         : bits == 5 ? Cost{40, 10, 50, 8}
         : bits == 3 ? Cost{18, 27, 49, 8}
         : bits == 4 ? Cost{21, 2, pass, 8}
                     : Cost{10, 2, 40, 8};
}
constexpr Cost gemm_cost(int bits, Codec codec) {
  const float pass = codec == Codec::kLut && bits >= 4 ? 34.0f : 32.0f;
  return bits >= 6   ? Cost{67, bits == 8 ? 55.0f : 41.0f, pass, 6}
         : bits >= 3 ? Cost{28, 22, pass, 6}
                     : Cost{18, 5, pass, 6};
}
}  // namespace
}  // namespace lowbit::avx512vnni

#include "cpu/int8-inl.h"
LOWBIT_EXPORT_TABLE(kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(avx512vnni)
