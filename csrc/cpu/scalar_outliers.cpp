#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/vec_scalar.h"
#include "cpu/outliers-inl.h"
// clang-format on
LOWBIT_EXPORT_OUTLIERS(scalar)
