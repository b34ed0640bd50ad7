#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/fp8_avx2.h"
#include "cpu/fp8_mm_f16c-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_MATMUL(Fp8F16cFamily)
