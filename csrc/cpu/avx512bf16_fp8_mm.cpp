#define LOWBIT_ISA avx512bf16
#define LOWBIT_ISA_BIT kAvx512Bf16
// clang-format off: the vectors come first
#include "cpu/fp8_avx512.h"
#include "cpu/fp8_mm_bf16-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_MATMUL(Fp8Bf16)
