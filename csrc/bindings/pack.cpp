// Packing of codes, between numpy arrays: what `lowbit._C` has for packing.py and layouts/n16.py.
#include "cpu/offline/pack.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "core/n16.h"

namespace lowbit {
namespace {

CanonicalCodes canonical(int64_t n, int64_t k, int bits, int base) {
  if (n < 0 || k < 0 || n > INT32_MAX || k > INT32_MAX) {
    fail("shape must be from 0 to below 2^31, got (" + std::to_string(n) + ", " + std::to_string(k) + ")");
  }
  if (bits < 1 || bits > 8) fail("bits must be 1 to 8, got " + std::to_string(bits));
  const bool fits = base == 0 || (base >= 2 && base <= 1 << bits);
  if (!fits) fail("base must be 0 or from 2 to 2^bits, got " + std::to_string(base));
  return {n, k, base ? ceil_div(k, digits_per_byte(base)) : ceil_div(k * bits, 8), bits, base};
}

using Bytes = Array<uint8_t>;

Bytes py_pack(const Bytes& codes, int bits, int base, int threads) {
  if (codes.ndim() != 2) fail("codes must be 2-D, got shape " + shape_string(codes));
  const CanonicalCodes s = canonical(codes.shape(0), codes.shape(1), bits, base);
  Bytes out({s.n, s.row_bytes});
  const uint8_t* in = codes.data();
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release unlocked;
  pack_rows(in, s, to, threads);
  return out;
}

Bytes py_unpack(const Bytes& packed, int64_t k, int bits, int base, int threads) {
  const CanonicalCodes s = canonical(packed.ndim() ? packed.shape(0) : 0, k, bits, base);
  want_shape("packed", packed, s.n, s.row_bytes);
  Bytes out({s.n, s.k});
  const uint8_t* in = packed.data();
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release unlocked;
  unpack_rows(in, s, to, threads);
  return out;
}

Bytes py_prepack(const Bytes& packed, int64_t n, int64_t k, int bits, int base, int threads) {
  const CanonicalCodes s = canonical(n, k, bits, base);
  want_shape("packed", packed, s.n, s.row_bytes);
  Bytes out(static_cast<py::ssize_t>(s.n16_bytes()));
  const uint8_t* in = packed.data();
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release unlocked;
  prepack(in, s, to, threads);
  return out;
}

Bytes py_unprepack(const Bytes& n16, int64_t n, int64_t k, int bits, int base, int threads) {
  const CanonicalCodes s = canonical(n, k, bits, base);
  if (n16.size() != s.n16_bytes()) {
    fail("codes must have " + std::to_string(s.n16_bytes()) + " bytes, got " + std::to_string(n16.size()));
  }
  Bytes out({s.n, s.row_bytes});
  const uint8_t* in = n16.data();
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release unlocked;
  unprepack(in, s, to, threads);
  return out;
}

}  // namespace

void bind_pack(py::module_& m) {
  m.def("pack", &py_pack, py::arg("codes"), py::arg("bits"), py::arg("base") = 0, py::arg("threads") = 1);
  m.def("unpack", &py_unpack, py::arg("packed"), py::arg("k"), py::arg("bits"), py::arg("base") = 0,
        py::arg("threads") = 1);
  m.def("prepack", &py_prepack, py::arg("packed"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("base") = 0,
        py::arg("threads") = 1);
  m.def("unprepack", &py_unprepack, py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("base") = 0,
        py::arg("threads") = 1);
}

}  // namespace lowbit
