// The search of scales on numpy arrays: what `lowbit._C` has for backends/cpu/scale_search.py.
#include "cpu/offline/scale_search.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings/bindings.h"

namespace lowbit {
namespace {

py::tuple py_search_scales(const Array<float>& weights, const std::optional<Array<float>>& importance, int64_t group,
                           const Array<float>& scales, const std::optional<Array<float>>& steps, int top,
                           const std::tuple<int, int, float>& floats, const Array<float>& table,
                           const Array<float>& ratios, int threads) {
  if (weights.ndim() != 2 || weights.size() == 0) {
    fail("weights must be 2-D and not empty, got shape " + shape_string(weights));
  }
  if (group < 1) fail("group must be at least 1, got " + std::to_string(group));
  const int64_t rows = weights.shape(0), k = weights.shape(1), groups = k / group + (k % group != 0);
  if (importance) want_shape("importance", *importance, rows, k);
  want_shape("scales", scales, rows, groups);
  if (steps) want_shape("steps", *steps, rows, groups);
  if (table.ndim() != 1 || table.size() < 1 || table.size() > 256) {
    fail("table must be 1-D with 1 to 256 entries, got shape " + shape_string(table));
  }
  if (!std::is_sorted(table.data(), table.data() + table.size())) fail("table must be ascending");
  if (ratios.ndim() != 1) fail("ratios must be 1-D, got shape " + shape_string(ratios));
  Array<float> found({rows, groups});
  std::copy_n(scales.data(), rows * groups, found.mutable_data());
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
  search.entries = static_cast<int>(table.size());
  search.ratios = ratios.data();
  search.num_ratios = static_cast<int>(ratios.size());
  search.scales = found.mutable_data();
  search.errors = errors.mutable_data();
  run_unlocked([&](Stop* stop) { search_scales(search, threads, stop); });
  return py::make_tuple(found, errors);
}

}  // namespace

void bind_scale_search(py::module_& m) {
  m.def("search_scales", &py_search_scales, py::arg("weights"), py::arg("importance"), py::arg("group"),
        py::arg("scales"), py::arg("steps"), py::arg("top"), py::arg("floats"), py::arg("table"), py::arg("ratios"),
        py::arg("threads") = 1);
}

}  // namespace lowbit
