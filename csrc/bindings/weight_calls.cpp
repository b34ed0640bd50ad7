// Products with a weight and its decoding: `Weight` on numpy arrays, `BoundWeight` on addresses. Every argument has a
// name, as all of them are numbers to Python. Work runs without the GIL.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/names.h"
#include "bindings/tensor_call.h"
#include "bindings/weight.h"
#include "core/address.h"
#include "core/n16.h"
#include "decoder/decoder.h"

namespace lowbit {
namespace {

Call linear_call(const BoundWeight& w, uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t bias,
                 int bias_dtype, uint64_t out, int threads, int kernel) {
  Call call{.launch = w.launch};
  Launch& l = call.launch;
  l.m = m;
  l.x = pointer<const void>(x);
  l.x_dtype = l.out_dtype = static_cast<Dtype>(x_dtype);
  l.x_stride = x_stride;
  l.bias = pointer<const void>(bias);
  l.bias_dtype = static_cast<Dtype>(bias_dtype);
  l.out = pointer<void>(out);
  l.out_stride = l.n;
  call.kernel = &w.weight.kernel(w.weight.request(Op::kLinear, l.x_dtype, m, threads), kernel);
  return call;
}

void linear(const BoundWeight& w, uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t bias, int bias_dtype,
            uint64_t out, int threads, int kernel) {
  Call call = linear_call(w, x, x_dtype, m, x_stride, bias, bias_dtype, out, threads, kernel);
  py::gil_scoped_release unlocked;
  run_many({&call, 1}, threads);
}

// A product whose arguments are prepared and checked once.
struct BoundLinear {
  Call call;
  int threads;
  void run() {
    py::gil_scoped_release unlocked;
    run_many({&call, 1}, threads);
  }
};
BoundLinear bind_linear(const BoundWeight& w, uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t bias,
                        int bias_dtype, uint64_t out, int threads) {
  return {.call = linear_call(w, x, x_dtype, m, x_stride, bias, bias_dtype, out, threads, -1), .threads = threads};
}

// `linear` with what follows it, stored as `out_dtype`.
void linear_epilogue(const BoundWeight& w, uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t bias,
                     int bias_dtype, uint64_t out, int out_dtype, int threads, int activation, uint64_t gate,
                     int64_t gate_stride, uint64_t residual, int64_t residual_stride, int epilogue_dtype) {
  if (activation < 0 || activation > static_cast<int>(Activation::kGeluTanh)) fail("activation is out of range");
  Call call = linear_call(w, x, x_dtype, m, x_stride, bias, bias_dtype, out, threads, -1);
  const Epilogue epilogue{.activation = static_cast<Activation>(activation),
                          .gate = pointer<const void>(gate),
                          .gate_stride = gate_stride,
                          .residual = pointer<const void>(residual),
                          .residual_stride = residual_stride,
                          .dtype = static_cast<Dtype>(epilogue_dtype)};
  call.launch.epilogue = &epilogue;
  call.launch.out_dtype = static_cast<Dtype>(out_dtype);
  py::gil_scoped_release unlocked;
  run_many({&call, 1}, threads);
}

// x is int8 or b1. x_scales are (m), or (m, ceil(k / x_group)) if that is not 0; int8 out holds y / out_scale.
void linear_quantized(const BoundWeight& w, uint64_t x, int x_dtype, uint64_t x_scales, int64_t x_group, int64_t m,
                      int64_t x_stride, uint64_t bias, int bias_dtype, uint64_t out, int out_dtype, float out_scale,
                      int threads, int kernel) {
  Call call = linear_call(w.with_x_group(x_group), x, x_dtype, m, x_stride, bias, bias_dtype, out, threads, kernel);
  call.launch.x_scales = pointer<float>(x_scales);
  call.launch.out_dtype = static_cast<Dtype>(out_dtype);
  call.launch.out_inverse = 1.0f / out_scale;
  py::gil_scoped_release unlocked;
  run_many({&call, 1}, threads);
}

void dequantize(const BoundWeight& w, uint64_t out, int out_dtype, int threads, int kernel) {
  Launch l = w.launch;
  l.m = 1;
  l.out = pointer<void>(out);
  l.out_dtype = static_cast<Dtype>(out_dtype);
  l.out_stride = l.k;
  const Kernel& chosen = w.weight.kernel(w.weight.request(Op::kDequantize, l.out_dtype, 1, threads), kernel);
  py::gil_scoped_release unlocked;
  run(chosen, l, threads);
}

void embedding(const BoundWeight& w, uint64_t indices, int64_t count, uint64_t out, int out_dtype, int threads) {
  Launch l = w.launch;
  l.out = pointer<void>(out);
  l.out_dtype = static_cast<Dtype>(out_dtype);
  l.out_stride = l.k;
  py::gil_scoped_release unlocked;
  embed(l, w.weight.bits, w.weight.scope, pointer<const int64_t>(indices), count, threads);
}

DecoderLinear decoder_linear(const BoundWeight& given, uint64_t bias, int bias_dtype, float x_scale) {
  const BoundWeight w = x_scale > 0 ? given.with_x_group(0) : given;
  DecoderLinear linear{.launch = w.launch,
                       .request = w.weight.request(Op::kLinear, Dtype::kF32, 1, 1),
                       .dense = nullptr,
                       .x_scale = x_scale};
  linear.launch.bias = pointer<const void>(bias);
  linear.launch.bias_dtype = static_cast<Dtype>(bias_dtype);
  return linear;
}

// One of several products with the same x.
struct Product {
  BoundWeight weight;
  uint64_t bias;
  int bias_dtype;
  uint64_t out;
};

// y_i = x W_i^T + bias_i in one parallel region.
void linear_many(const std::vector<Product>& products, uint64_t x, int x_dtype, int64_t m, int64_t x_stride,
                 int threads) {
  std::vector<Call> calls;
  calls.reserve(products.size());
  for (const Product& p : products) {
    calls.push_back(linear_call(p.weight, x, x_dtype, m, x_stride, p.bias, p.bias_dtype, p.out, threads, -1));
  }
  py::gil_scoped_release unlocked;
  run_many(calls, threads);
}

// y = x W^T + bias on numpy arrays, fp32. Scales and zeros in fp32 lanes layout.
Array<float> linear_numpy(const Weight& w, const Array<float>& x, const Array<uint8_t>& codes,
                          const Array<float>& table, const std::optional<Array<float>>& scales,
                          const std::optional<Array<float>>& zeros, const std::optional<Array<float>>& bias,
                          int threads) {
  if (x.ndim() != 2 || x.shape(1) != w.k) {
    fail("x must have shape (m, " + std::to_string(w.k) + "), got " + shape_string(x));
  }
  const auto want = [](const char* name, const py::array& a, int64_t size) {
    if (a.size() != size) {
      fail(std::string(name) + " must have " + std::to_string(size) + " elements, got shape " + shape_string(a));
    }
  };
  want("codes", codes, w.code_bytes());
  want("table", table, w.table_size());
  if (scales.has_value() != w.scale_dtype.has_value())
    fail("scales must be given if and only if the weight has a scale dtype");
  if (zeros.has_value() != w.zero_dtype.has_value()) fail("zeros must be given if and only if the weight has zeros");
  if (w.scale_dtype.value_or(Dtype::kF32) != Dtype::kF32 || w.zero_dtype.value_or(Dtype::kF32) != Dtype::kF32 ||
      w.scale2_dtype) {
    fail("scales and zeros of the numpy call are fp32; make the Weight with fp32");
  }
  if (scales) want("scales", *scales, w.lane_terms());
  if (zeros) want("zeros", *zeros, w.lane_terms());
  if (bias) want("bias", *bias, w.n);
  Array<float> out({x.shape(0), static_cast<py::ssize_t>(w.n)});
  const auto address = [](const py::array& a) { return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(a.data())); };
  const BoundWeight bound(w, address(codes), scales ? address(*scales) : 0, zeros ? address(*zeros) : 0, address(table),
                          0, 0);
  linear(bound, address(x), 0, x.shape(0), w.k, bias ? address(*bias) : 0, 0, address(out), threads, -1);
  return out;
}

std::string selected(const Weight& w, const std::string& op, const std::string& x, int64_t m, int threads) {
  const Kernel* k = select(w.request(op_of(op), dtype_of(x), m, threads), active_isa());
  return k ? k->name : "";
}

// (name, estimated ns or None, threads or None, reason or None) of every kernel of the op.
py::list explain(const Weight& w, const std::string& op, const std::string& x, int64_t m, int threads) {
  const Request request = w.request(op_of(op), dtype_of(x), m, threads);
  py::list found;
  for (const Kernel* k : kernels()) {
    if (k->op != request.op || k->bits != request.bits) continue;
    const char* why = rejection(*k, request, active_isa());
    if (why) {
      found.append(py::make_tuple(k->name, py::none(), py::none(), why));
    } else {
      found.append(py::make_tuple(k->name, cost(*k, request), threads_for(*k, request), py::none()));
    }
  }
  return found;
}

// For linear_tensors.
py::capsule plan(const Weight& w) {
  return make_plan({.request = w.request(Op::kLinear, Dtype::kF32, 0, 1),
                    .launch = w.launch(),
                    .code_bytes = w.code_bytes(),
                    .has_scales = w.scale_dtype.has_value(),
                    .has_zeros = w.zero_dtype.has_value(),
                    .has_scales2 = w.scale2_dtype.has_value(),
                    .has_zeros2 = w.has_zeros2()});
}

}  // namespace

void bind_weights(py::module_& m) {
  using py::arg;
  using py::kw_only;
  py::class_<Weight>(m, "Weight", "What a weight in n16 layout is, apart from its bytes (csrc/bindings/weight.h).")
      .def(py::init<int64_t, int64_t, int, int64_t, const std::string&, const std::string&, int64_t, const std::string&,
                    std::optional<std::string>, std::optional<std::string>, std::optional<std::string>, int64_t, bool,
                    int64_t, float, bool, bool>(),
           kw_only(), arg("n"), arg("k"), arg("bits"), arg("group"), arg("codec") = "lut", arg("scope") = "shared",
           arg("table_groups") = 1, arg("zero") = "none", arg("scale_dtype") = py::none(),
           arg("zero_dtype") = py::none(), arg("scale2_dtype") = py::none(), arg("scale2_extent") = 0,
           arg("int8_x") = false, arg("x_group") = 0, arg("table_step") = 0.0f, arg("bf16_table") = false,
           arg("trits") = false)
      .def("linear", &linear_numpy, arg("x"), arg("codes"), arg("table"), arg("scales") = py::none(),
           arg("zeros") = py::none(), arg("bias") = py::none(), arg("threads") = 1)
      .def("select", &selected, arg("op"), arg("x"), arg("m"), arg("threads") = 1)
      .def("explain", &explain, arg("op"), arg("x"), arg("m"), arg("threads") = 1)
      .def_property_readonly("code_bytes", &Weight::code_bytes)
      .def_property_readonly("lane_terms", &Weight::lane_terms)
      .def_property_readonly("table_size", &Weight::table_size);
  py::class_<BoundLinear>(m, "BoundLinear", "A product with its arguments prepared.")
      .def("__call__", &BoundLinear::run);
  py::class_<BoundWeight>(m, "BoundWeight", "A weight with the addresses of its tensors, which the caller keeps alive.")
      .def(py::init<const Weight&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>(), arg("weight"),
           kw_only(), arg("codes"), arg("scales"), arg("zeros"), arg("table"), arg("scales2"), arg("zeros2"))
      .def("linear", &linear, kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("x_stride"), arg("bias"),
           arg("bias_dtype"), arg("out"), arg("threads"), arg("kernel") = -1)
      .def("bind_linear", &bind_linear, kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("x_stride"), arg("bias"),
           arg("bias_dtype"), arg("out"), arg("threads"))
      .def("linear_epilogue", &linear_epilogue, kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("x_stride"),
           arg("bias"), arg("bias_dtype"), arg("out"), arg("out_dtype"), arg("threads"), arg("activation"), arg("gate"),
           arg("gate_stride"), arg("residual"), arg("residual_stride"), arg("epilogue_dtype"))
      .def("linear_quantized", &linear_quantized, kw_only(), arg("x"), arg("x_dtype"), arg("x_scales"), arg("x_group"),
           arg("m"), arg("x_stride"), arg("bias"), arg("bias_dtype"), arg("out"), arg("out_dtype"), arg("out_scale"),
           arg("threads"), arg("kernel"))
      .def("dequantize", &dequantize, kw_only(), arg("out"), arg("out_dtype"), arg("threads"), arg("kernel"))
      .def("embedding", &embedding, kw_only(), arg("indices"), arg("count"), arg("out"), arg("out_dtype"),
           arg("threads"))
      .def("decoder_linear", &decoder_linear, kw_only(), arg("bias"), arg("bias_dtype"), arg("x_scale"));
  py::class_<Product>(m, "Product", "A weight, a bias and where their product with x goes, for `linear_many`.")
      .def(py::init([](const BoundWeight& weight, uint64_t bias, int bias_dtype, uint64_t out) {
             return Product{.weight = weight, .bias = bias, .bias_dtype = bias_dtype, .out = out};
           }),
           arg("weight"), kw_only(), arg("bias"), arg("bias_dtype"), arg("out"));
  m.def("linear_many", &linear_many, arg("products"), kw_only(), arg("x"), arg("x_dtype"), arg("m"), arg("x_stride"),
        arg("threads"));
  m.def("plan", &plan, arg("weight"));
  m.def("use_dynamic_map", &use_dynamic_map, arg("values"));
}

}  // namespace lowbit
