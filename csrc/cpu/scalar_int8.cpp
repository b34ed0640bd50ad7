#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/vec_scalar.h"
#include "cpu/int8_any-inl.h"
// clang-format on
LOWBIT_EXPORT_TABLE_OF(scalar_int8, kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(scalar)
