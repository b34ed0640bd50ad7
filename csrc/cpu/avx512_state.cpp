#define LOWBIT_ISA avx512
#define LOWBIT_ISA_BIT kAvx512
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/state_avx512.h"
// clang-format on

#include "cpu/fp8_adamw-inl.h"
LOWBIT_EXPORT_FP8_ADAMW(avx512)
