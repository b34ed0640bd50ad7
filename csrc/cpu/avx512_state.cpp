#define LOWBIT_ISA avx512
#define LOWBIT_ISA_BIT kAvx512
// clang-format off: the vectors come first
#include "cpu/state_avx512.h"
#include "cpu/fp8_adamw-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_ADAMW(avx512)
