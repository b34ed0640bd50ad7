#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/fp8_scalar.h"
#include "cpu/fp8_mm_f32-inl.h"
// clang-format on
LOWBIT_EXPORT_FP8_MATMUL(Fp8F32Family)
