#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/state_avx2.h"
#include "cpu/fp8_adamw-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_ADAMW(avx2)
