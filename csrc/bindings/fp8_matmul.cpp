// Products of FP8 matrices by raw pointers: what `lowbit._C` has for backends/cpu/fp8_matmul.py.
#include "cpu/fp8/fp8_matmul.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "core/address.h"
#include "core/dispatch.h"

namespace lowbit {
namespace {

// Bytes between rows of codes, elements between rows of scales; k_shift -1: whole rows.
Fp8Operand make_operand(uint64_t codes, int64_t stride, int type, uint64_t scales, int scale_type, int row_shift,
                        int k_shift, int64_t scale_stride) {
  return {.codes = pointer<const uint8_t>(codes),
          .stride = stride,
          .type = static_cast<Float8>(type),
          .scales = {.values = pointer<const void>(scales),
                     .type = static_cast<ScaleType>(scale_type),
                     .row_shift = row_shift,
                     .k_shift = k_shift < 0 ? kWholeRow : k_shift,
                     .stride = scale_stride}};
}

// y (m, n) = (a * sa) (b * sb)^T + bias. `isa` "" is the newest instruction set of this CPU, another name caps it.
void py_fp8_matmul(int64_t m, int64_t n, int64_t k, const Fp8Operand& a, const Fp8Operand& b, uint64_t bias,
                   int bias_dtype, uint64_t out, int out_dtype, int threads, const std::string& isa) {
  want_positive({{"k", k}});
  Fp8Matmul q{};
  q.out.m = m;
  q.out.n = n;
  q.out.k = k;
  q.out.bias = pointer<const void>(bias);
  q.out.bias_dtype = static_cast<Dtype>(bias_dtype);
  q.out.out = pointer<void>(out);
  q.out.out_dtype = static_cast<Dtype>(out_dtype);
  q.out.out_stride = n;
  q.a = a;
  q.b = b;
  const Fp8MatmulKernel& kernel = fp8_matmul_kernel(cap_isa(active_isa(), isa.c_str()));
  py::gil_scoped_release unlocked;
  fp8_matmul(kernel, q, threads);
}

// The name of the kernel that runs.
const char* py_fp8_matmul_name(const std::string& isa) {
  return fp8_matmul_kernel(cap_isa(active_isa(), isa.c_str())).name;
}

}  // namespace

// Adds the kernels of FP8 products to the entries of `_C.kernels()`, the newest instruction set first.
void append_fp8_matmul_kernels(py::list& entries) {
  const auto units = fp8_matmul_kernels();
  for (auto unit = units.rbegin(); unit != units.rend(); ++unit) {
    const Fp8MatmulKernel* k = unit->given;
    py::dict entry;
    entry["index"] = entries.size();
    entry["name"] = k->name;
    entry["op"] = "fp8_scaled_mm";
    entry["compute"] = k->compute == Dtype::kBf16 ? "bf16" : "fp32";
    entry["codec"] = "fp8";
    entry["bits"] = 8;
    entry["scope"] = "shared";
    entry["isa"] = isa_name(k->isa);
    entry["available"] = (detect_isa() & k->isa) != 0;
    entry["group_multiple"] = 16;
    entry["cost"] = py::none();
    entry["bf16_table"] = k->compute == Dtype::kBf16;
    entry["x"] = std::vector<std::string>{"e4m3", "e5m2"};
    entries.append(entry);
  }
}

void bind_fp8_matmul(py::module_& m) {
  using py::arg;
  py::class_<Fp8Operand>(m, "Fp8Operand", "As in csrc/cpu/fp8/fp8_matmul.h.")
      .def(py::init(&make_operand), py::kw_only(), arg("codes"), arg("stride"), arg("type"), arg("scales"),
           arg("scale_type"), arg("row_shift"), arg("k_shift"), arg("scale_stride"));
  m.def("fp8_matmul_ptr", &py_fp8_matmul, py::kw_only(), arg("m"), arg("n"), arg("k"), arg("a"), arg("b"), arg("bias"),
        arg("bias_dtype"), arg("out"), arg("out_dtype"), arg("threads"), arg("isa") = "");
  m.def("fp8_matmul_name", &py_fp8_matmul_name, py::arg("isa") = "");
}

}  // namespace lowbit
