#define LOWBIT_ISA avx2
#define LOWBIT_ISA_BIT kAvx2
// clang-format off: the vectors come first
#include "cpu/vec_avx2.h"
#include "cpu/signs_avx2.h"
// clang-format on

// Estimated from counted instructions, not measured: it decides the number of threads alone, as these rows have no
// rivals.
namespace lowbit::avx2 {
namespace {
constexpr Cost kXnorCost{8, 4, 14, 4};
}
}  // namespace lowbit::avx2

#include "cpu/xnor-inl.h"
LOWBIT_EXPORT_BINARY(avx2_xnor)
