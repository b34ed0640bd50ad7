// Steps of optimizers by raw pointers: what `lowbit._C` has for optim.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "bindings/names.h"
#include "core/address.h"
#include "core/dispatch.h"
#include "cpu/optim/fp8_adamw.h"

namespace py = pybind11;

namespace lowbit {
namespace {

Fp8State make_state(uint64_t codes, int type, uint64_t terms) {
  return {.codes = pointer<uint8_t>(codes), .type = static_cast<Float8>(type), .terms = pointer<float>(terms)};
}

// `isa` caps the instruction set as LOWBIT_ISA does.
void py_fp8_adamw(uint64_t param, uint64_t grad, int dtype, int64_t numel, const Fp8State& exp_avg,
                  const Fp8State& exp_avg_sq, bool expand, double step, double lr, double beta1, double beta2,
                  double eps, double weight_decay, bool maximize, int threads, const std::string& isa) {
  Fp8AdamW z{};
  z.param = pointer<void>(param);
  z.grad = pointer<const void>(grad);
  z.dtype = static_cast<Dtype>(dtype);
  z.numel = numel;
  z.exp_avg = exp_avg;
  z.exp_avg_sq = exp_avg_sq;
  z.expand = expand;
  z.beta1 = static_cast<float>(beta1);
  z.rest1 = static_cast<float>(maximize ? beta1 - 1 : 1 - beta1);
  z.beta2 = static_cast<float>(beta2);
  z.rest2 = static_cast<float>(1 - beta2);
  z.eps = static_cast<float>(eps);
  z.decay = static_cast<float>(1 - lr * weight_decay);
  z.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  z.root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  const uint32_t mask = mask_of(isa);
  py::gil_scoped_release unlocked;
  fp8_adamw(z, mask, threads);
}

}  // namespace

void bind_optim(py::module_& m) {
  using py::arg;
  py::class_<Fp8State>(m, "Fp8State", "As in csrc/cpu/optim/fp8_adamw.h.")
      .def(py::init(&make_state), py::kw_only(), arg("codes"), arg("type"), arg("terms"));
  m.def("fp8_adamw_ptr", &py_fp8_adamw, py::kw_only(), arg("param"), arg("grad"), arg("dtype"), arg("numel"),
        arg("exp_avg"), arg("exp_avg_sq"), arg("expand"), arg("step"), arg("lr"), arg("beta1"), arg("beta2"),
        arg("eps"), arg("weight_decay"), arg("maximize"), arg("threads"), arg("isa") = "");
}

}  // namespace lowbit
