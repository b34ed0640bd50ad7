// Structured weights: what `lowbit._C` has for backends/cpu/structured.py.
#include "cpu/structured/structured.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/bindings.h"
#include "bindings/names.h"
#include "core/address.h"
#include "core/dispatch.h"
#include "cpu/structured/trellis.h"

namespace lowbit {
namespace {

// Low bits of states: of every row, each below 2^(16 - bits), or -1.
const int32_t* rests(const char* name, const std::optional<Array<int32_t>>& given, int64_t rows, int bits) {
  if (!given) return nullptr;
  if (given->ndim() != 1 || given->shape(0) != rows) {
    fail(std::string(name) + " must have shape (" + std::to_string(rows) + ",), got " + shape_string(*given));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t rest = given->data()[r];
    if (rest < -1 || rest >= kTrellisStates >> bits) {
      fail(std::string(name) + " must be from -1 to " + std::to_string((kTrellisStates >> bits) - 1) + ", got " +
           std::to_string(rest));
    }
  }
  return given->data();
}

Array<uint8_t> py_encode_trellis(const Array<float>& numbers, const Array<float>& values, int bits,
                                 const std::optional<Array<int32_t>>& next, const std::optional<Array<int32_t>>& first,
                                 int threads, const std::string& isa) {
  if (numbers.ndim() != 2) fail("numbers must be 2-D, got shape " + shape_string(numbers));
  if (values.ndim() != 1 || values.shape(0) != kTrellisStates) {
    fail("values must have shape (65536,), got " + shape_string(values));
  }
  if (bits < 1 || bits > kMaxTrellisStep) fail("bits must be 1 to 4, got " + std::to_string(bits));
  if (first && !next) fail("first needs next");
  TrellisEncode t{};
  t.numbers = numbers.data();
  t.rows = numbers.shape(0);
  t.count = numbers.shape(1);
  t.bits = bits;
  t.values = values.data();
  t.next = rests("next", next, t.rows, bits);
  t.first = rests("first", first, t.rows, bits);
  Array<uint8_t> codes({t.rows, t.count});
  t.codes = codes.mutable_data();
  const uint32_t mask = mask_of(isa);
  run_unlocked([&](Stop* stop) { encode_trellis(t, mask, threads, stop); });
  return codes;
}

StructuredWeight weight_of(int codec, int bits, int dim, int64_t n, int64_t k, int64_t row_bytes, uint64_t codes,
                           uint64_t table, uint64_t signs, uint64_t grid, float second, uint64_t scales,
                           int scale_dtype, int64_t group) {
  want_positive({{"k", k}, {"group", group}, {"bits", bits}, {"dim", dim}});
  StructuredWeight w{};
  w.codec = static_cast<StructuredCodec>(codec);
  w.bits = bits;
  w.dim = dim;
  w.n = n;
  w.k = k;
  w.row_bytes = row_bytes;
  w.codes = pointer<const uint8_t>(codes);
  w.table = pointer<const float>(table);
  w.signs = pointer<const float>(signs);
  w.grid = pointer<const uint32_t>(grid);
  w.second = second;
  w.scales = pointer<const void>(scales);
  w.scale_dtype = static_cast<Dtype>(scale_dtype);
  w.group = group;
  w.groups = k / group + (k % group != 0);
  return w;
}

void py_structured_rows(const StructuredWeight& w, uint64_t rows, int64_t count, uint64_t out, int out_dtype,
                        int threads, const std::string& isa) {
  StructuredRows r{w, pointer<const int64_t>(rows), count, pointer<void>(out), static_cast<Dtype>(out_dtype)};
  const uint32_t mask = mask_of(isa);
  py::gil_scoped_release unlocked;
  structured_rows(r, mask, threads);
}

void py_structured_linear(const StructuredWeight& w, uint64_t x, int x_dtype, int64_t m, int64_t x_stride,
                          uint64_t bias, int bias_dtype, uint64_t out, int out_dtype, int threads,
                          const std::string& isa) {
  if (m < 0 || m > kStructuredRows) fail("m must be 0 to 8, got " + std::to_string(m));
  StructuredLinear l{};
  l.w = w;
  l.x = pointer<const void>(x);
  l.x_dtype = static_cast<Dtype>(x_dtype);
  l.m = m;
  l.x_stride = x_stride;
  l.bias = pointer<const void>(bias);
  l.bias_dtype = static_cast<Dtype>(bias_dtype);
  l.out = pointer<void>(out);
  l.out_dtype = static_cast<Dtype>(out_dtype);
  const uint32_t mask = mask_of(isa);
  py::gil_scoped_release unlocked;
  structured_linear(l, mask, threads);
}

}  // namespace

void bind_structured(py::module_& m) {
  using py::arg;
  m.def("encode_trellis", &py_encode_trellis, arg("numbers"), arg("values"), arg("bits"), arg("next") = py::none(),
        arg("first") = py::none(), arg("threads") = 1, arg("isa") = "");
  py::class_<StructuredWeight>(m, "StructuredWeight")
      .def(py::init(&weight_of), py::kw_only(), arg("codec"), arg("bits"), arg("dim"), arg("n"), arg("k"),
           arg("row_bytes"), arg("codes"), arg("table"), arg("signs"), arg("grid"), arg("second"), arg("scales"),
           arg("scale_dtype"), arg("group"));
  m.def("structured_rows", &py_structured_rows, arg("weight"), py::kw_only(), arg("rows"), arg("count"), arg("out"),
        arg("out_dtype"), arg("threads"), arg("isa") = "");
  m.def("structured_linear", &py_structured_linear, arg("weight"), py::kw_only(), arg("x"), arg("x_dtype"), arg("m"),
        arg("x_stride"), arg("bias"), arg("bias_dtype"), arg("out"), arg("out_dtype"), arg("threads"), arg("isa") = "");
  m.def(
      "structured_isa", [](int codec) { return structured_isa(static_cast<StructuredCodec>(codec), active_isa()); },
      arg("codec"));
}

}  // namespace lowbit
