// The search of scales on numpy arrays: what `lowbit._C` has for backends/cpu/scale_search.py.
#include "cpu/offline/scale_search.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/names.h"

namespace lowbit {
namespace {

py::tuple py_search_scales(const Array<float>& weights, const std::optional<Array<float>>& importance, int64_t group,
                           const Array<float>& scales, const std::optional<Array<float>>& steps, int top,
                           const std::tuple<int, int, float>& floats, const Array<float>& table,
                           const Array<float>& ratios, const std::optional<Array<uint8_t>>& chosen, int threads,
                           const std::string& isa) {
  if (weights.ndim() != 2 || weights.size() == 0) {
    fail("weights must be 2-D and not empty, got shape " + shape_string(weights));
  }
  if (group < 1) fail("group must be at least 1, got " + std::to_string(group));
  const int64_t rows = weights.shape(0), k = weights.shape(1), groups = k / group + (k % group != 0);
  if (importance) want_shape("importance", *importance, rows, k);
  want_shape("scales", scales, rows, groups);
  if (steps) want_shape("steps", *steps, rows, groups);
  const int64_t tables = table.ndim() == 2 ? table.shape(0) : 1, entries = tables ? table.size() / tables : 0;
  if ((table.ndim() != 1 && table.ndim() != 2) || tables > 256 || entries < 1 || entries > 256) {
    fail("table must be 1-D with 1 to 256 entries, or 2-D with as many tables, got shape " + shape_string(table));
  }
  for (int64_t t = 0; t < tables; ++t) {
    const float* own = table.data() + t * entries;
    if (!std::is_sorted(own, own + entries)) fail("table must be ascending");
  }
  if (chosen) {
    want_shape("chosen", *chosen, rows, groups);
    const uint8_t* numbers = chosen->data();
    if (std::any_of(numbers, numbers + rows * groups, [&](uint8_t number) { return number >= tables; })) {
      fail("chosen must be below the number of tables, " + std::to_string(tables));
    }
  }
  if (ratios.ndim() != 1) fail("ratios must be 1-D, got shape " + shape_string(ratios));
  Array<float> found({rows, groups});
  std::copy_n(scales.data(), rows * groups, found.mutable_data());
  Array<uint8_t> tables_found({rows, groups});
  if (chosen) {
    std::copy_n(chosen->data(), rows * groups, tables_found.mutable_data());
  } else {
    std::fill_n(tables_found.mutable_data(), rows * groups, uint8_t{0});
  }
  Array<double> errors(rows);
  ScaleSearch search{};
  search.weights = weights.data();
  search.importance = importance ? importance->data() : nullptr;
  search.rows = rows;
  search.k = k;
  search.group = group;
  search.steps = steps ? steps->data() : nullptr;
  search.top = top;
  std::tie(search.digits, search.least, search.most) = floats;
  search.table = table.data();
  search.tables = static_cast<int>(tables);
  search.entries = static_cast<int>(entries);
  search.ratios = ratios.data();
  search.num_ratios = static_cast<int>(ratios.size());
  search.scales = found.mutable_data();
  search.chosen = tables_found.mutable_data();
  search.errors = errors.mutable_data();
  const uint32_t mask = mask_of(isa);
  run_unlocked([&](Stop* stop) { search_scales(search, mask, threads, stop); });
  return py::make_tuple(found, errors, tables_found);
}

}  // namespace

void bind_scale_search(py::module_& m) {
  m.def("search_scales", &py_search_scales, py::arg("weights"), py::arg("importance"), py::arg("group"),
        py::arg("scales"), py::arg("steps"), py::arg("top"), py::arg("floats"), py::arg("table"), py::arg("ratios"),
        py::arg("chosen") = py::none(), py::arg("threads") = 1, py::arg("isa") = "");
}

}  // namespace lowbit
