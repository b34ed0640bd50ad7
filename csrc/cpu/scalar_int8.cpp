#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
#include "cpu/int8_any-inl.h"
#include "cpu/vec_scalar.h"
LOWBIT_EXPORT_TABLE_OF(scalar_int8, kInt8Kernels)
LOWBIT_EXPORT_QUANTIZE(scalar)
