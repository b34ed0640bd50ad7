#define LOWBIT_ISA avx512vpopcntdq
#define LOWBIT_ISA_BIT kAvx512Vpopcntdq
// clang-format off: the vectors come first
#include "cpu/vec_avx512.h"
#include "cpu/signs_avx512.h"
// clang-format on

// Estimated from counted instructions, not measured: it decides the number of threads alone, as these rows have no
// rivals.
namespace lowbit::avx512vpopcntdq {
namespace {
constexpr Cost kXnorCost{5, 2, 4, 4};
}
}  // namespace lowbit::avx512vpopcntdq

#include "cpu/xnor-inl.h"
LOWBIT_EXPORT_BINARY(avx512vpopcntdq)
