#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/state_avx2.h"
// clang-format on

#include "cpu/fp8_adamw-inl.h"
LOWBIT_EXPORT_FP8_ADAMW(avx2)
