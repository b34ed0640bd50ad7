// Quantization of activations by raw pointers: what `lowbit._C` has for int8.py and binary.py.
#include "bindings/bindings.h"
#include "core/address.h"
#include "cpu/activations/binary.h"
#include "cpu/activations/int8.h"

namespace lowbit {
namespace {

// x (m, k) to q (m, k) int8 and scales (m, groups); or with the given scales (m).
void py_quantize_int8(uint64_t x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, int64_t group, uint64_t scales,
                      bool static_scales, uint64_t q, int threads) {
  want_positive({{"k", k}, {"group", group}});
  const QuantizeInt8 request{
      pointer<const void>(x), static_cast<Dtype>(x_dtype), x_stride, k, group, pointer<float>(scales), static_scales};
  py::gil_scoped_release unlocked;
  quantize_int8(request, m, pointer<int8_t>(q), threads);
}

// x (m, k) to signs (m, ceil(k / 8)) and scales (m).
void py_quantize_binary(uint64_t x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, uint64_t scales, uint64_t bits,
                        int threads) {
  want_positive({{"k", k}});
  const QuantizeBinary request{pointer<const void>(x), static_cast<Dtype>(x_dtype), x_stride, k,
                               pointer<float>(scales)};
  py::gil_scoped_release unlocked;
  quantize_binary(request, m, pointer<uint8_t>(bits), threads);
}

}  // namespace

void bind_activations(py::module_& m) {
  m.def("quantize_int8_ptr", &py_quantize_int8);
  m.def("quantize_binary_ptr", &py_quantize_binary);
}

}  // namespace lowbit
