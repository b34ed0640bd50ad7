#define LOWBIT_ISA avx512
#define LOWBIT_ISA_BIT kAvx512
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/outliers-inl.h"
// clang-format on
LOWBIT_EXPORT_OUTLIERS(avx512)
