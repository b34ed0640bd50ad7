// Convolutions by raw pointers: what `lowbit._C` has for backends/cpu/conv.py.
#include "cpu/conv/conv.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/bindings.h"
#include "bindings/weight.h"
#include "core/address.h"
#include "core/dispatch.h"

namespace lowbit {
namespace {

using Three = std::array<int64_t, 3>;

ConvShape make_shape(int64_t batch, int64_t channels, int64_t groups, const Three& size, const Three& kernel,
                     const Three& stride, const Three& before, const Three& dilation, const Three& out) {
  want_positive({{"batch", batch}, {"channels", channels}, {"groups", groups}});
  ConvShape s{.batch = batch, .channels = channels, .groups = groups};
  for (int i = 0; i < 3; ++i) {
    want_positive({{"size", size[i]}, {"kernel", kernel[i]}, {"stride", stride[i]}, {"dilation", dilation[i]}});
    want_positive({{"out", out[i]}});
    if (before[i] < 0) fail("before must not be negative, got " + std::to_string(before[i]));
    s.size[i] = size[i];
    s.kernel[i] = kernel[i];
    s.stride[i] = stride[i];
    s.before[i] = before[i];
    s.dilation[i] = dilation[i];
    s.out[i] = out[i];
  }
  return s;
}

Activation activation_of(int code) {
  if (code < 0 || code > static_cast<int>(Activation::kGeluTanh)) fail("activation is out of range");
  return static_cast<Activation>(code);
}

// x (batch, size, channels) with the weight (n, taps * channels); x_scales are those of the pixels of int8 x.
void py_conv(const BoundWeight& given, const ConvShape& shape, uint64_t x, int x_dtype, uint64_t x_scales,
             uint64_t bias, int bias_dtype, int activation, uint64_t out, int out_dtype, int threads, int kernel) {
  if (shape.groups != 1) fail("groups must be 1, got " + std::to_string(shape.groups));
  const BoundWeight w = static_cast<Dtype>(x_dtype) == Dtype::kI8 ? given.with_x_group(0) : given;
  if (shape.taps() * shape.channels != w.weight.k) {
    fail("weight must have " + std::to_string(shape.taps() * shape.channels) + " columns, got " +
         std::to_string(w.weight.k));
  }
  Launch l = w.launch;
  const Epilogue epilogue{.activation = activation_of(activation)};
  l.m = shape.rows();
  l.x = pointer<const void>(x);
  l.x_dtype = static_cast<Dtype>(x_dtype);
  l.x_scales = pointer<float>(x_scales);
  l.bias = pointer<const void>(bias);
  l.bias_dtype = static_cast<Dtype>(bias_dtype);
  l.out = pointer<void>(out);
  l.out_dtype = static_cast<Dtype>(out_dtype);
  l.out_stride = l.n;
  l.epilogue = epilogue.activation == Activation::kNone ? nullptr : &epilogue;
  const Kernel& chosen = w.weight.kernel(w.weight.request(Op::kLinear, l.x_dtype, l.m, threads), kernel);
  py::gil_scoped_release unlocked;
  run_conv(chosen, l, shape, threads);
}

// As py_conv, with groups: the weight (n, taps * channels / groups) is decoded first.
void py_grouped_conv(const BoundWeight& w, const ConvShape& shape, uint64_t x, int x_dtype, uint64_t bias,
                     int bias_dtype, int activation, uint64_t out, int out_dtype, int threads, const std::string& isa) {
  const int64_t n = w.weight.n, k = shape.taps() * (shape.channels / shape.groups);
  if (shape.channels % shape.groups || n % shape.groups || n < 1) fail("groups must divide channels and filters");
  if (k != w.weight.k) {
    fail("weight must have " + std::to_string(k) + " columns, got " + std::to_string(w.weight.k));
  }
  const GroupedConv c{.shape = shape,
                      .x = pointer<const void>(x),
                      .x_dtype = static_cast<Dtype>(x_dtype),
                      .n = n,
                      .bias = pointer<const void>(bias),
                      .bias_dtype = static_cast<Dtype>(bias_dtype),
                      .activation = activation_of(activation),
                      .out = pointer<void>(out),
                      .out_dtype = static_cast<Dtype>(out_dtype)};
  if (c.x_dtype != Dtype::kF32 && (n != shape.groups || shape.channels != shape.groups)) {
    fail("x must be fp32 unless each channel has a filter of its own");
  }
  const uint32_t mask = isa.empty() ? active_isa() : cap_isa(detect_isa(), isa.c_str());
  const Kernel& decode = w.weight.kernel(w.weight.request(Op::kDequantize, Dtype::kF32, 1, threads), -1);
  py::gil_scoped_release unlocked;
  run_grouped_conv(c, decode, w.launch, mask, threads);
}

}  // namespace

void bind_conv(py::module_& m) {
  using py::arg;
  using py::kw_only;
  py::class_<ConvShape>(m, "ConvShape", "Where the patches of a convolution lie (csrc/cpu/conv/conv.h).")
      .def(py::init(&make_shape), kw_only(), arg("batch"), arg("channels"), arg("groups"), arg("size"), arg("kernel"),
           arg("stride"), arg("before"), arg("dilation"), arg("out"));
  m.def("conv_ptr", &py_conv, arg("weight"), arg("shape"), kw_only(), arg("x"), arg("x_dtype"), arg("x_scales"),
        arg("bias"), arg("bias_dtype"), arg("activation"), arg("out"), arg("out_dtype"), arg("threads"),
        arg("kernel") = -1);
  m.def("grouped_conv_ptr", &py_grouped_conv, arg("weight"), arg("shape"), kw_only(), arg("x"), arg("x_dtype"),
        arg("bias"), arg("bias_dtype"), arg("activation"), arg("out"), arg("out_dtype"), arg("threads"),
        arg("isa") = "");
  m.def("grouped_conv_isa", [] { return grouped_conv_isa(active_isa()); });
}

}  // namespace lowbit
