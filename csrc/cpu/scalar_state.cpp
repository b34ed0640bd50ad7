#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/state_scalar.h"
#include "cpu/fp8_adamw-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_ADAMW(scalar)
