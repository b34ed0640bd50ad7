// 1-D k-means on numpy arrays: what `lowbit._C` has for backends/cpu/kmeans.py.
#include "cpu/offline/kmeans.h"

#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.h"

namespace lowbit {
namespace {

Array<float> py_kmeans_1d(const Array<float>& values, const std::optional<Array<double>>& weights, int k) {
  if (values.ndim() != 1 || values.size() == 0)
    fail("values must be 1-D and not empty, got shape " + shape_string(values));
  if (k < 1 || k > 256) fail("k must be 1 to 256, got " + std::to_string(k));
  if (weights && weights->size() != values.size())
    fail("weights must be as long as values, got shape " + shape_string(*weights));
  Array<float> centers(k);
  const float* v = values.data();
  const double* w = weights ? weights->data() : nullptr;
  float* c = centers.mutable_data();
  const int64_t n = values.size();
  run_unlocked([&](Stop* stop) { kmeans_rows(v, w, 1, n, k, c, 1, stop); });
  return centers;
}

Array<float> py_kmeans_rows(const Array<float>& values, const std::optional<Array<double>>& weights, int k,
                            int threads) {
  if (values.ndim() != 2 || values.size() == 0) {
    fail("values must be 2-D and not empty, got shape " + shape_string(values));
  }
  if (k < 1 || k > 256) fail("k must be 1 to 256, got " + std::to_string(k));
  const int64_t rows = values.shape(0), n = values.shape(1);
  if (weights) want_shape("weights", *weights, rows, n);
  Array<float> centers({rows, static_cast<int64_t>(k)});
  const float* v = values.data();
  const double* w = weights ? weights->data() : nullptr;
  float* c = centers.mutable_data();
  run_unlocked([&](Stop* stop) { kmeans_rows(v, w, rows, n, k, c, threads, stop); });
  return centers;
}

}  // namespace

void bind_kmeans(py::module_& m) {
  m.def("kmeans_1d", &py_kmeans_1d, py::arg("values"), py::arg("weights"), py::arg("k"));
  m.def("kmeans_rows", &py_kmeans_rows, py::arg("values"), py::arg("weights"), py::arg("k"), py::arg("threads") = 1);
}

}  // namespace lowbit
