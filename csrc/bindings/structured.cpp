// Structured weights: what `lowbit._C` has for backends/cpu/structured.py.
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/bindings.h"
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
  const uint32_t mask = isa.empty() ? active_isa() : cap_isa(detect_isa(), isa.c_str());
  run_unlocked([&](Stop* stop) { encode_trellis(t, mask, threads, stop); });
  return codes;
}

}  // namespace

void bind_structured(py::module_& m) {
  using py::arg;
  m.def("encode_trellis", &py_encode_trellis, arg("numbers"), arg("values"), arg("bits"), arg("next") = py::none(),
        arg("first") = py::none(), arg("threads") = 1, arg("isa") = "");
}

}  // namespace lowbit
