#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/nibbles-inl.h"
// clang-format on

namespace lowbit::avx2 {
namespace {
// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
const Kernel kNibbleKernels[] = {nibbles(LOWBIT_NAME("gemv", "f32", "bytelut4"), {58, 0, 75, 2}),
                                 nibbles_bf16(LOWBIT_NAME("gemv", "f32", "bf16lut4"), {52, 0, 76, 2})};
}  // namespace
}  // namespace lowbit::avx2
LOWBIT_EXPORT_TABLE_OF(avx2_nibbles, kNibbleKernels)
