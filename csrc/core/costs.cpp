#include "core/costs.h"

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "core/costs/sapphire.h"
#include "core/costs/zen5.h"

namespace lowbit {

namespace {

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// From the table of the nearest CPU, or from the other one for kernels that it cannot run.
const KernelCost* find(std::string_view name) {
  static const bool intel = is_intel();
  const std::span<const KernelCost> sapphire = kSapphire, zen5 = kZen5;
  for (const auto table : {intel ? sapphire : zen5, intel ? zen5 : sapphire}) {
    const auto found = std::ranges::find_if(table, [&](const KernelCost& c) { return name == c.name; });
    if (found != table.end()) return &*found;
  }
  return nullptr;
}

// Of a pair of tables that was not measured: as of one with the entries of both; where there is none, as of one table,
// by the instructions of the two (cpu/weights/nibbles-inl.h).
Cost pair_cost(const Kernel& kernel) {
  const std::string pair = "pairlut" + std::to_string(kernel.bits), name = kernel.name;
  const auto as = [&](int bits) {
    return find(std::string(name).replace(name.find(pair), pair.size(), "lut" + std::to_string(bits)));
  };
  if (const KernelCost* both = as(kernel.bits + 1)) return both->cost;
  const KernelCost* one = as(kernel.bits);
  Cost cost = one ? one->cost : Cost{};
  for (float& row : cost.rows) row *= 58.0f / 38.0f;
  return cost;
}

}  // namespace

Cost cost_of(const Kernel& kernel) {
  if (const KernelCost* found = find(kernel.name)) return found->cost;
  return kernel.scope == Scope::kPair ? pair_cost(kernel) : Cost{};
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
