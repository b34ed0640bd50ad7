// FP8 by raw pointers: what `lowbit._C` has for backends/cpu/fp8.py. `isa` "" is the newest instruction set of this
// CPU, another name caps it.
#include "cpu/fp8/fp8.h"

#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "core/address.h"
#include "core/dispatch.h"

namespace lowbit {
namespace {

const Fp8Ops& ops_of(const std::string& isa) { return fp8_ops(cap_isa(active_isa(), isa.c_str())); }

Fp8Blocks make_blocks(int64_t rows, int64_t k, int64_t block_rows, int64_t block_k, int64_t row_blocks) {
  want_positive({{"block_rows", block_rows}, {"block_k", block_k}});
  return {.rows = rows, .k = k, .block_rows = block_rows, .block_k = block_k, .row_blocks = row_blocks};
}
Fp8Source source(uint64_t x, int dtype, int64_t stride) {
  return {.x = pointer<const void>(x), .dtype = static_cast<Dtype>(dtype), .stride = stride};
}

void py_maxima(const Fp8Blocks& blocks, uint64_t x, int dtype, int64_t stride, uint64_t maxima, int threads,
               const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  py::gil_scoped_release unlocked;
  fp8_maxima(ops, blocks, source(x, dtype, stride), pointer<float>(maxima), threads);
}

void py_quantize(const Fp8Blocks& blocks, uint64_t x, int dtype, int64_t stride, int type, int scale_type,
                 uint64_t maxima, uint64_t scales, uint64_t q, uint64_t transposed, bool stochastic, uint64_t seed,
                 int threads, const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  const Fp8Quantize request{.blocks = blocks,
                            .x = source(x, dtype, stride),
                            .type = static_cast<Float8>(type),
                            .scale_type = static_cast<ScaleType>(scale_type),
                            .maxima = pointer<const float>(maxima),
                            .scales = pointer<void>(scales),
                            .q = pointer<uint8_t>(q),
                            .stochastic = stochastic,
                            .seed = seed};
  py::gil_scoped_release unlocked;
  fp8_quantize(ops, request, pointer<uint8_t>(transposed), threads);
}

void py_dequantize(const Fp8Blocks& blocks, uint64_t q, int type, uint64_t scales, int scale_type, uint64_t out,
                   int out_dtype, int threads, const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  const Fp8Dequantize request{.blocks = blocks,
                              .q = pointer<const uint8_t>(q),
                              .type = static_cast<Float8>(type),
                              .scales = pointer<const void>(scales),
                              .scale_type = static_cast<ScaleType>(scale_type),
                              .out = pointer<void>(out),
                              .out_dtype = static_cast<Dtype>(out_dtype)};
  py::gil_scoped_release unlocked;
  fp8_dequantize(ops, request, threads);
}

void py_cast(uint64_t x, int dtype, int64_t count, int type, bool saturate, uint64_t q, int threads,
             const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  py::gil_scoped_release unlocked;
  fp8_cast(ops, pointer<const void>(x), static_cast<Dtype>(dtype), count, static_cast<Float8>(type), saturate,
           pointer<uint8_t>(q), threads);
}

}  // namespace

void bind_fp8(py::module_& m) {
  using py::arg;
  using py::kw_only;
  py::class_<Fp8Blocks>(m, "Fp8Blocks", "As in csrc/cpu/fp8/fp8.h.")
      .def(py::init(&make_blocks), kw_only(), arg("rows"), arg("k"), arg("block_rows"), arg("block_k"),
           arg("row_blocks"));
  m.def("fp8_maxima_ptr", &py_maxima, arg("blocks"), kw_only(), arg("x"), arg("dtype"), arg("stride"), arg("maxima"),
        arg("threads"), arg("isa") = "");
  m.def("fp8_quantize_ptr", &py_quantize, arg("blocks"), kw_only(), arg("x"), arg("dtype"), arg("stride"), arg("type"),
        arg("scale_type"), arg("maxima"), arg("scales"), arg("q"), arg("transposed"), arg("stochastic"), arg("seed"),
        arg("threads"), arg("isa") = "");
  m.def("fp8_dequantize_ptr", &py_dequantize, arg("blocks"), kw_only(), arg("q"), arg("type"), arg("scales"),
        arg("scale_type"), arg("out"), arg("out_dtype"), arg("threads"), arg("isa") = "");
  m.def("fp8_cast_ptr", &py_cast, kw_only(), arg("x"), arg("dtype"), arg("count"), arg("type"), arg("saturate"),
        arg("q"), arg("threads"), arg("isa") = "");
}

}  // namespace lowbit
