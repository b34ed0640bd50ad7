#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
// clang-format off: the vectors come first
#include "cpu/vec_scalar.h"
#include "cpu/signs_scalar.h"
// clang-format on

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 4.
namespace lowbit::scalar {
namespace {
constexpr Cost kXnorCost{80, 20, 260, 4};
}
}  // namespace lowbit::scalar

#include "cpu/xnor-inl.h"
LOWBIT_EXPORT_BINARY(scalar_xnor)
