// One family of kernels for one instruction set. cmake/units.cmake compiles this file once for each, with LOWBIT_ISA,
// LOWBIT_ISA_BIT, LOWBIT_UNIT, the two headers, and what the unit exports. One file, and not one written for each: a
// compiler cache then serves every build folder.
// clang-format off: the vectors come first
#include LOWBIT_UNIT_VECTORS
#include LOWBIT_UNIT_BODY
// clang-format on

LOWBIT_UNIT_EXPORT
