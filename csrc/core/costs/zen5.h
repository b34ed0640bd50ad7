#pragma once

#include "core/costs.h"

namespace lowbit {

inline constexpr KernelCost kZen5[] = {{"none", {1, 0, 1, 1}}};

}  // namespace lowbit
