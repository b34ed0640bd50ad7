#define LOWBIT_ISA avx512vnni
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/int8-inl.h"
// clang-format on
LOWBIT_EXPORT_TABLE(kInt8Kernels)
