// The sparse term of a weight with outliers, and pruned weights, by raw pointers: what `lowbit._C` has for
// backends/cpu/sparse.py.
#include <string>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "core/address.h"
#include "core/dispatch.h"
#include "cpu/sparse/outliers.h"
#include "cpu/sparse/pruned.h"

namespace lowbit {
namespace {

// out (m, n) fp32 = x (m, k) times the transpose of S (n, k). `isa` caps the instruction set as LOWBIT_ISA does.
void py_multiply_outliers(uint64_t x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, uint64_t columns,
                          uint64_t values, int value_dtype, int64_t n, int64_t count, uint64_t out, int threads,
                          const std::string& isa) {
  want_positive({{"k", k}});
  Outliers z{};
  z.m = m;
  z.n = n;
  z.k = k;
  z.count = count;
  z.x = pointer<const void>(x);
  z.x_dtype = static_cast<Dtype>(x_dtype);
  z.x_stride = x_stride;
  z.columns = pointer<const int32_t>(columns);
  z.values = pointer<const void>(values);
  z.value_dtype = static_cast<Dtype>(value_dtype);
  z.out = pointer<float>(out);
  const uint32_t mask = mask_of(isa);
  py::gil_scoped_release unlocked;
  multiply_outliers(z, mask, threads);
}

// out (m, n) fp32 = x (m, k) times the transpose of a pruned weight (n, k); see cpu/sparse/pruned.h.
void py_multiply_pruned(uint64_t x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, uint64_t entries,
                        int64_t steps, uint64_t starts, uint64_t table, int bits, int64_t n, uint64_t out, int threads,
                        const std::string& isa) {
  want_positive({{"k", k}});
  if (bits < 1 || bits > 8) fail("bits must be 1 to 8, got " + std::to_string(bits));
  Pruned z{};
  z.m = m;
  z.n = n;
  z.k = k;
  z.x = pointer<const void>(x);
  z.x_dtype = static_cast<Dtype>(x_dtype);
  z.x_stride = x_stride;
  z.entries = pointer<const uint8_t>(entries);
  z.steps = steps;
  z.starts = pointer<const int64_t>(starts);
  z.table = pointer<const float>(table);
  z.bits = bits;
  z.out = pointer<float>(out);
  const uint32_t mask = mask_of(isa);
  py::gil_scoped_release unlocked;
  multiply_pruned(z, mask, threads);
}

}  // namespace

void bind_outliers(py::module_& m) {
  using py::arg;
  m.def("multiply_outliers_ptr", &py_multiply_outliers, py::kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("k"),
        arg("x_stride"), arg("columns"), arg("values"), arg("value_dtype"), arg("n"), arg("count"), arg("out"),
        arg("threads"), arg("isa") = "");
  m.def("multiply_pruned_ptr", &py_multiply_pruned, py::kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("k"),
        arg("x_stride"), arg("entries"), arg("steps"), arg("starts"), arg("table"), arg("bits"), arg("n"), arg("out"),
        arg("threads"), arg("isa") = "");
  m.def("pruned_isa", [] { return pruned_isa(active_isa()); });
  m.def("outliers_isa", [] { return outliers_isa(active_isa()); });
}

}  // namespace lowbit
