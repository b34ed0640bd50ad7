#include "core/costs.h"

#include <algorithm>
#include <iterator>
#include <string_view>

#include "core/costs/zen5.h"

namespace lowbit {

Cost cost_of(const Kernel& kernel) {
  const auto named = [&](const KernelCost& c) { return std::string_view(c.name) == kernel.name; };
  const KernelCost* found = std::ranges::find_if(kZen5, named);
  return found == std::end(kZen5) ? Cost{} : found->cost;
}

}  // namespace lowbit
