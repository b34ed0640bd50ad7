#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/bytes_avx2.h"
// clang-format on

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::avx2 {
namespace {
// Wide products take two instructions for one.
constexpr Cost skinny_cost(int bits, Codec codec) {
  const float pass = codec == Codec::kLut ? 108.0f : bits == 8 ? 97.0f : 50.0f;
  return codec == Codec::kLut && bits >= 6     ? Cost{185, 60, 236, 4}
         : bits == 3 || bits == 5 || bits == 6 ? Cost{42, 15, pass + 16, 4}
         : bits == 8                           ? Cost{120, 20, pass, 4}
                                               : Cost{44, 5, pass, 4};
}
constexpr Cost gemm_cost(int bits, Codec codec) {
  const float pass = codec == Codec::kLut ? 93.0f : bits == 8 ? 83.0f : 46.0f;
  return codec == Codec::kLut && bits >= 6 ? Cost{190, 160, pass, 4}
         : bits == 4 || bits <= 2          ? Cost{46, 35, pass, 4}
                                           : Cost{89, 70, pass, 4};
}
}  // namespace
}  // namespace lowbit::avx2

#include "cpu/int8-inl.h"
LOWBIT_EXPORT_TABLE_OF(avx2_int8, kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(avx2)
