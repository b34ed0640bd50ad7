// The Python module `lowbit._cuda`: raw device pointers and a stream, nothing of torch. It loads without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../core/address.h"
#include "heuristics.h"
#include "kernels.h"
#include "launch.cuh"
#include "probe.h"

namespace py = pybind11;

namespace lowbit::cuda {
namespace {

Type type_of(const std::string& name) {
  if (name == "fp32") return Type::kF32;
  if (name == "bf16") return Type::kBf16;
  if (name == "fp16") return Type::kF16;
  if (name == "int8") return Type::kI8;
  throw std::invalid_argument("type must be fp32, bf16, fp16 or int8, got '" + name + "'");
}
Zero zero_of(const std::optional<std::string>& name) {
  if (!name) return Zero::kNone;
  if (*name == "int") return Zero::kInt;
  if (*name == "float") return Zero::kSubtract;
  if (*name == "min") return Zero::kAdd;
  throw std::invalid_argument("zero must be None, int, float or min, got '" + *name + "'");
}
cudaStream_t use(int device, uint64_t stream) {
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess)
    throw std::runtime_error(std::string("cudaSetDevice: ") + cudaGetErrorString(error));
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(stream));
}

// Why the kernels of this build do not run on a device, None if they do, and the architecture that the mma kernels
// which run there were compiled for: that of a device's own code, or an older one whose code the driver translates.
std::pair<std::optional<std::string>, int> probe(int device) {
  Facts f;
  cudaDriverGetVersion(&f.driver);
  cudaRuntimeGetVersion(&f.runtime);
  if (f.driver) {
    cudaFuncAttributes attributes{};
    int major = 0, minor = 0;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = mma_attributes(&attributes);
    f.device = 10 * major + minor;
    f.code = attributes.ptxVersion;
    if (error != cudaSuccess) f.failed = cudaGetErrorString(error);
    f.describes_tensors = error == cudaSuccess && encode_tiled_address();
    cudaGetLastError();  // said here; the next launch is not to find it
  }
  const std::string why = obstacle(f);
  return {why.empty() ? std::nullopt : std::optional(why), f.code};
}

// What an m16 weight is, apart from its bytes.
struct Weight {
  int64_t n, k, group;
  int bits;
  Zero zero;
  Type scale_type, zero_type;
  bool has_scale;

  Weight(int64_t n_, int64_t k_, int64_t group_, int bits_, const std::optional<std::string>& zero_,
         const std::optional<std::string>& scale, const std::optional<std::string>& zero_kind)
      : n(n_),
        k(k_),
        group(group_ < k_ ? group_ : (k_ > 0 ? k_ : 1)),
        bits(bits_),
        zero(zero_of(zero_)),
        scale_type(scale ? type_of(*scale) : Type::kF32),
        zero_type(zero_kind ? type_of(*zero_kind) : Type::kI8),
        has_scale(scale.has_value()) {
    if (n < 0 || k < 0) throw std::invalid_argument("n and k must not be negative");
    if (bits < 1 || bits > 8 || bits == 7)
      throw std::invalid_argument("bits must be 1 to 6 or 8, got " + std::to_string(bits));
    if (group < 1 || !group_fits(group, k))
      throw std::invalid_argument("group must be 16, 32, a multiple of 64 or the whole row, got " +
                                  std::to_string(group_));
    if ((zero == Zero::kInt) != (zero != Zero::kNone && zero_type == Type::kI8))
      throw std::invalid_argument("integer zeros, and only they, are int8");
  }
  int64_t num_groups() const { return k ? ceil_div(k, group) : 1; }
  bool float_zero() const { return zero == Zero::kSubtract || zero == Zero::kAdd; }

  // (family, tiles_m, splits, stages_per_split, shared, depth, bulk)
  py::tuple choose(int64_t m, int architecture, int code, int sms) const {
    return tuple_of(cuda::choose(request(m, architecture, code, sms)));
  }
  // All that `linear` takes; `choose` gives one of them, or decodes.
  py::list candidates(int64_t m, int architecture, int code, int sms) const {
    py::list found;
    for (const Config& c : cuda::candidates(request(m, architecture, code, sms))) found.append(tuple_of(c));
    return found;
  }
  Request request(int64_t m, int architecture, int code, int sms) const {
    if (m < 1 || sms < 1) throw std::invalid_argument("m and sms must be positive");
    return {m,    n,  k, group, bits, has_scale ? type_bytes(scale_type) : 0, zero == Zero::kInt ? 1 : 0, architecture,
            code, sms};
  }
  static py::tuple tuple_of(const Config& c) {
    const char* const families[] = {"mma", "wgmma", "decode"};
    return py::make_tuple(families[static_cast<int>(c.family)], c.tiles_m, c.splits, c.stages_per_split, c.shared,
                          c.depth, c.bulk);
  }

  void linear(int device, uint64_t stream, const py::tuple& config, const std::string& type, int64_t m, uint64_t x,
              int64_t x_stride, uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t x_sums,
              uint64_t bias, const std::string& bias_type, uint64_t out, const std::string& out_type,
              uint64_t parts) const {
    const std::string family = py::cast<std::string>(config[0]);
    const Config c{family == "mma" ? Family::kMma : Family::kWgmma,
                   py::cast<int32_t>(config[1]),
                   py::cast<int32_t>(config[2]),
                   py::cast<int64_t>(config[3]),
                   py::cast<int32_t>(config[4]),
                   py::cast<int32_t>(config[5]),
                   py::cast<bool>(config[6])};
    const Type t = type_of(type);
    if (family == "decode" || (t != Type::kBf16 && t != Type::kF16))
      throw std::invalid_argument("no kernel of family " + family + " for " + type);
    const Linear p{m,
                   n,
                   k,
                   group,
                   num_groups(),
                   bits,
                   t,
                   pointer<const void>(x),
                   x_stride,
                   pointer<const uint32_t>(codes),
                   pointer<const void>(scales),
                   scale_type,
                   pointer<const void>(zeros),
                   zero_type,
                   zero,
                   pointer<const float>(table),
                   pointer<const float>(x_sums),
                   pointer<const void>(bias),
                   type_of(bias_type),
                   pointer<void>(out),
                   type_of(out_type),
                   pointer<float>(parts)};
    const py::gil_scoped_release release;
    const cudaStream_t s = use(device, stream);
    if (float_zero()) sum_groups(p.x, t, x_stride, m, k, group, pointer<float>(x_sums), s);
    if (c.family == Family::kMma)
      t == Type::kBf16 ? mma_bf16(p, c, device, s) : mma_f16(p, c, device, s);
    else
      t == Type::kBf16 ? wgmma_bf16(p, c, device, s) : wgmma_f16(p, c, device, s);
  }

  void dequantize(int device, uint64_t stream, int64_t rows, uint64_t indices, uint64_t codes, uint64_t scales,
                  uint64_t zeros, uint64_t table, uint64_t out, const std::string& out_type) const {
    cuda::dequantize(
        Dequantize{rows, n, k, group, num_groups(), bits, pointer<const int64_t>(indices),
                   pointer<const uint32_t>(codes), pointer<const void>(scales), scale_type, pointer<const void>(zeros),
                   zero_type, zero, pointer<const float>(table), pointer<void>(out), type_of(out_type)},
        use(device, stream));
  }
};

Scales scales_of(const std::string& name) {
  if (name == "tensor") return Scales::kTensor;
  if (name == "row") return Scales::kRow;
  if (name == "1x128") return Scales::kBlock1x128;
  if (name == "128x128") return Scales::kBlock128x128;
  throw std::invalid_argument("granularity must be tensor, row, 1x128 or 128x128, got '" + name + "'");
}

// (a (m, k) * scales) (b (n, k) * scales)^T + bias; operands are (pointer, bytes between rows, e5m2, scales,
// granularity).
void fp8_scaled_mm(int device, uint64_t stream, const py::tuple& a, const py::tuple& b, int64_t m, int64_t n, int64_t k,
                   uint64_t bias, const std::string& bias_type, uint64_t out, const std::string& out_type) {
  const auto operand = [](const py::tuple& t, int64_t rows) {
    const int64_t stride = py::cast<int64_t>(t[1]);
    const uint64_t address = py::cast<uint64_t>(t[0]);
    if (stride % 16 || address % 16) throw std::invalid_argument("rows of a and b must begin at multiples of 16 bytes");
    return Fp8Operand{pointer<const void>(address),
                      rows,
                      stride,
                      py::cast<bool>(t[2]),
                      pointer<const float>(py::cast<uint64_t>(t[3])),
                      scales_of(py::cast<std::string>(t[4]))};
  };
  const Fp8Operand oa = operand(a, m), ob = operand(b, n);
  const Fp8Config c = choose_fp8(m, oa.kind, ob.kind);
  const Fp8Product x{c.transposed ? ob : oa, c.transposed ? oa : ob,    k,
                     c.transposed,           pointer<const void>(bias), type_of(bias_type),
                     pointer<void>(out),     type_of(out_type)};
  const py::gil_scoped_release release;
  fp8_product(x, c.cols, device, use(device, stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::class_<Weight>(m, "Weight")
      .def(py::init<int64_t, int64_t, int64_t, int, const std::optional<std::string>&,
                    const std::optional<std::string>&, const std::optional<std::string>&>(),
           py::arg("n"), py::arg("k"), py::arg("group"), py::arg("bits"), py::arg("zero"), py::arg("scale_type"),
           py::arg("zero_type"))
      .def_property_readonly("num_groups", &Weight::num_groups)
      .def_property_readonly("float_zero", &Weight::float_zero)
      .def("candidates", &Weight::candidates, py::arg("m"), py::arg("architecture"), py::arg("code"), py::arg("sms"))
      .def("choose", &Weight::choose, py::arg("m"), py::arg("architecture"), py::arg("code"), py::arg("sms"))
      .def("linear", &Weight::linear)
      .def("dequantize", &Weight::dequantize, py::call_guard<py::gil_scoped_release>());
  m.def("probe", &probe, py::arg("device"), py::call_guard<py::gil_scoped_release>());
  m.def("fp8_scaled_mm", &fp8_scaled_mm);
}

}  // namespace lowbit::cuda
