// FP8 by raw pointers: what `lowbit._C` has for backends/cpu/fp8.py. `isa` "" is the newest instruction set of this
// CPU, another name caps it.
#include "cpu/fp8/fp8.h"

#include <cstdint>
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "core/address.h"
#include "core/dispatch.h"

namespace lowbit {
namespace {

const Fp8Ops& ops_of(const std::string& isa) { return fp8_ops(cap_isa(active_isa(), isa.c_str())); }

// rows, k, block_rows, block_k, row_blocks
using Blocks = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
Fp8Blocks blocks_of(const Blocks& b) {
  const auto& [rows, k, block_rows, block_k, row_blocks] = b;
  want_positive({{"block_rows", block_rows}, {"block_k", block_k}});
  return {rows, k, block_rows, block_k, row_blocks};
}

void py_maxima(const Blocks& blocks, uint64_t x, int dtype, int64_t stride, uint64_t maxima, int threads,
               const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  const Fp8Blocks of = blocks_of(blocks);
  py::gil_scoped_release unlocked;
  fp8_maxima(ops, of, {pointer<const void>(x), static_cast<Dtype>(dtype), stride}, pointer<float>(maxima), threads);
}

void py_quantize(const Blocks& blocks, uint64_t x, int dtype, int64_t stride, int type, int scale_type, uint64_t maxima,
                 uint64_t scales, uint64_t q, uint64_t transposed, bool stochastic, uint64_t seed, int threads,
                 const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  const Fp8Quantize request{blocks_of(blocks),
                            {pointer<const void>(x), static_cast<Dtype>(dtype), stride},
                            static_cast<Float8>(type),
                            static_cast<ScaleType>(scale_type),
                            pointer<const float>(maxima),
                            pointer<void>(scales),
                            pointer<uint8_t>(q),
                            stochastic,
                            seed};
  py::gil_scoped_release unlocked;
  fp8_quantize(ops, request, pointer<uint8_t>(transposed), threads);
}

void py_dequantize(const Blocks& blocks, uint64_t q, int type, uint64_t scales, int scale_type, uint64_t out,
                   int out_dtype, int threads, const std::string& isa) {
  const Fp8Ops& ops = ops_of(isa);
  const Fp8Dequantize request{blocks_of(blocks),
                              pointer<const uint8_t>(q),
                              static_cast<Float8>(type),
                              pointer<const void>(scales),
                              static_cast<ScaleType>(scale_type),
                              pointer<void>(out),
                              static_cast<Dtype>(out_dtype)};
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
  m.def("fp8_maxima_ptr", &py_maxima);
  m.def("fp8_quantize_ptr", &py_quantize);
  m.def("fp8_dequantize_ptr", &py_dequantize);
  m.def("fp8_cast_ptr", &py_cast);
}

}  // namespace lowbit
