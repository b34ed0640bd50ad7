// Addresses as Python hands them over.
#pragma once

#include <cstdint>

namespace lowbit {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

}  // namespace lowbit
