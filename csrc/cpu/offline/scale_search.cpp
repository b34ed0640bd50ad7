#include "cpu/offline/scale_search.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/registry.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(scale_search)

void search_scales(const ScaleSearch& search, uint32_t isa, int threads, Stop* stop) {
  const SearchRows rows = *newest(units::scale_search::kAll, isa).given;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(threads, search.rows));
  const auto size = static_cast<size_t>(2 * scale_search_padded(search) + int64_t{search.tables} * search.entries);
  // Here, for nothing may throw inside a parallel region.
  std::vector<std::vector<float>> scratch(static_cast<size_t>(tasks), std::vector<float>(size));
  parallel(tasks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      rows(search, task, tasks, scratch[static_cast<size_t>(task)].data(), stop, begin == 0);
    }
  });
}

}  // namespace lowbit
