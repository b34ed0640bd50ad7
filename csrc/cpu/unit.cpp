// One family of kernels for one instruction set. cmake/units.cmake compiles this file once for each, with what its
// tables say of the two: LOWBIT_ISA, LOWBIT_ISA_BIT, LOWBIT_VECTORS, and LOWBIT_UNIT_*. One file, and not one written
// for each: a compiler cache then serves every build folder.
#include LOWBIT_UNIT_BODY

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr LOWBIT_UNIT_TYPE kUnit = LOWBIT_UNIT_GIVES;

}  // namespace
}  // namespace LOWBIT_ISA

// Found by core/registry.h.
namespace units::LOWBIT_UNIT_FAMILY {

extern constinit const LOWBIT_UNIT_TYPE LOWBIT_ISA = lowbit::LOWBIT_ISA::kUnit;

}  // namespace units::LOWBIT_UNIT_FAMILY
}  // namespace lowbit
