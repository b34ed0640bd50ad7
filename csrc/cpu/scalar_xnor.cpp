#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/vec_scalar.h"
#include "cpu/signs_scalar.h"
// clang-format on

// Estimated from counted instructions, not measured: it decides the number of threads alone, as these rows have no
// rivals.
namespace lowbit::scalar {
namespace {
constexpr Cost kXnorCost{80, 20, 260, 4};
}
}  // namespace lowbit::scalar

#include "cpu/xnor-inl.h"
LOWBIT_EXPORT_BINARY(scalar_xnor)
