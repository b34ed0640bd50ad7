// The units of a family of kernels, one for each instruction set that it is compiled for (cmake/units.cmake), and the
// choice between them.
#pragma once

#include <cstddef>

#include "core/isa.h"

namespace lowbit {

template <class T>
struct Unit {
  Isa isa;
  const T* given;
};

// The unit of the newest instruction set in a mask, of units that stand from the oldest on; every mask has that one.
template <class T, size_t kCount>
constexpr const Unit<T>& newest(const Unit<T> (&units)[kCount], uint32_t isa_mask) {
  for (size_t i = kCount - 1; i > 0; --i) {
    if (units[i].isa & isa_mask) return units[i];
  }
  return units[0];
}

}  // namespace lowbit

#define LOWBIT_DECLARE_UNIT(isa, bit) extern const Given isa;
#define LOWBIT_LIST_UNIT(isa, bit) {bit, &isa},
// In namespace lowbit, after "units.h": units::<family>::kAll, all units of a family.
#define LOWBIT_REGISTRY(family)                                                      \
  namespace units::family {                                                          \
  using Given = LOWBIT_TYPE_##family;                                                \
  LOWBIT_FOREACH_UNIT_##family(LOWBIT_DECLARE_UNIT) constexpr Unit<Given> kAll[] = { \
      LOWBIT_FOREACH_UNIT_##family(LOWBIT_LIST_UNIT)};                               \
  }
