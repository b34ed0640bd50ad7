#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/outliers-inl.h"
// clang-format on
LOWBIT_EXPORT_OUTLIERS(avx2)
