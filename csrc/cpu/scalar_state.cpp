#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/vec_scalar.h"
#include "cpu/state_scalar.h"
// clang-format on

#include "cpu/fp8_adamw-inl.h"
LOWBIT_EXPORT_FP8_ADAMW(scalar)
