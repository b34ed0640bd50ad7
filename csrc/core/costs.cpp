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

// Rows between two points, and beyond the last, lie on the line through them.
double Cost::picoseconds(int64_t m, int64_t group) const {
  const double ends = 1.0 / static_cast<double>(std::max<int64_t>(1, group));
  if (m <= 1) return rows[0] + single_end * ends;
  int i = 0;
  while (i + 2 < kPoints && (int64_t{2} << i) < m) ++i;
  const double first = static_cast<double>(int64_t{1} << i), count = static_cast<double>(m);
  return rows[i] + (rows[i + 1] - rows[i]) * (count - first) / first + row_end * count * ends;
}

}  // namespace lowbit
