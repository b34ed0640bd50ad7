// The Python module `lowbit._C`: the kernel table, packing, and one call per op. Raw pointers for torch (this file and
// the module know nothing of it), numpy arrays for everybody else. Work runs without the GIL.
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/tensor_call.h"
#include "core/address.h"
#include "core/dispatch.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "cpu/offline/kmeans.h"
#include "decoder/decoder.h"

namespace lowbit {

void bind_activations(py::module_& m);              // activations.cpp
void bind_decoder(py::module_& m);                  // decoder.cpp
void bind_fp8(py::module_& m);                      // fp8.cpp
void bind_fp8_matmul(py::module_& m);               // fp8_matmul.cpp
void bind_optim(py::module_& m);                    // optim.cpp
void bind_outliers(py::module_& m);                 // sparse.cpp
void bind_pack(py::module_& m);                     // pack.cpp
void append_fp8_matmul_kernels(py::list& entries);  // fp8_matmul.cpp

namespace {

// By Dtype.
constexpr const char* kDtypeNames[] = {"fp32", "bf16", "fp16", "int8", "b1", "e4m3", "e8m0", "uint4", "uint6", "int6"};
Dtype dtype_of(const std::string& name) {
  for (int i = 0; i < 10; ++i) {
    if (name == kDtypeNames[i]) return static_cast<Dtype>(i);
  }
  fail("dtype must be fp32, bf16, fp16, int8 or b1, and of scales also e4m3, e8m0, uint4, uint6 or int6, got '" + name +
       "'");
}
const char* dtype_name(Dtype d) { return kDtypeNames[static_cast<int>(d)]; }

Op op_of(const std::string& name) {
  if (name == "linear") return Op::kLinear;
  if (name == "dequantize") return Op::kDequantize;
  fail("op must be linear or dequantize, got '" + name + "'");
}

// By Codec.
constexpr const char* kCodecNames[] = {"lut", "int", "e4m3", "e5m2"};
Codec codec_of(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kCodecNames[i]) return static_cast<Codec>(i);
  }
  fail("codec must be lut, int, e4m3 or e5m2, got '" + name + "'");
}

// What an n16 weight is, apart from its bytes.
struct Weight {
  int64_t n, k, group, table_groups;
  int bits;
  Codec codec;
  Scope scope;
  ZeroMode zero;
  std::optional<Dtype> scale_dtype, zero_dtype, scale2_dtype;
  int64_t scale2_extent;  // weights of a row that share a second level; 0: all of the weight, in fp32
  bool int8_x;            // float activations are quantized to int8
  float table_step;       // of the table as int8 (core/int8_table.h)
  bool bf16_table;

  Weight(int64_t n_, int64_t k_, int bits_, int64_t group_, const std::string& codec_name, bool column_table,
         int64_t table_groups_, const std::string& zero_mode, std::optional<std::string> scale,
         std::optional<std::string> zero_type, std::optional<std::string> scale2, int64_t scale2_extent_, bool int8_x_,
         float table_step_, bool bf16_table_)
      : n(n_),
        k(k_),
        group(group_),
        table_groups(table_groups_),
        bits(bits_),
        scale2_extent(scale2_extent_),
        int8_x(int8_x_),
        table_step(table_step_),
        bf16_table(bf16_table_) {
    if (n < 0 || k < 1 || n > INT32_MAX || k > INT32_MAX) {
      fail("shape must be (n >= 0, k >= 1) and below 2^31, got (" + std::to_string(n) + ", " + std::to_string(k) + ")");
    }
    if (bits < 1 || bits > 8 || bits == 7) fail("bits must be 1, 2, 3, 4, 5, 6 or 8, got " + std::to_string(bits));
    if (group < 1) fail("group must be positive, got " + std::to_string(group));
    if (group > k) group = k;
    if (table_groups != 1 && (!column_table || table_groups != groups())) {
      fail("table_groups must be 1 or the number of groups, got " + std::to_string(table_groups));
    }
    codec = codec_of(codec_name);
    if (codec == Codec::kInt) bf16_table = true;
    if ((codec == Codec::kE4m3 || codec == Codec::kE5m2) && (bits != 8 || column_table)) {
      fail("codec " + codec_name + " needs bits 8 and no column table, got bits " + std::to_string(bits) +
           (column_table ? " and a column table" : ""));
    }
    scope = column_table ? Scope::kColumn : Scope::kShared;
    if (zero_mode != "none" && zero_mode != "subtract" && zero_mode != "add") {
      fail("zero must be none, subtract or add, got '" + zero_mode + "'");
    }
    zero = zero_mode == "none" ? ZeroMode::kNone : zero_mode == "add" ? ZeroMode::kAdd : ZeroMode::kSubtract;
    if (scale) scale_dtype = dtype_of(*scale);
    if (zero_type) zero_dtype = dtype_of(*zero_type);
    if ((zero == ZeroMode::kNone) != !zero_dtype) fail("zero_dtype must be given if and only if there are zeros");
    const bool packed_scales = scale_dtype && packed_scale_bits(*scale_dtype);
    if (zero_dtype && static_cast<int>(*zero_dtype) >= kDtypes &&
        !(packed_scales && zero == ZeroMode::kAdd && zero_dtype == scale_dtype)) {
      fail("zero_dtype must be a number, or packed as the scales are with zero add, got " + *zero_type);
    }
    if (packed_scales && !scale2) fail("scale_dtype " + *scale + " needs a second level of scales");
    if (!scale2) return;
    scale2_dtype = dtype_of(*scale2);
    if (*scale2_dtype != Dtype::kF32 && *scale2_dtype != Dtype::kF16 && *scale2_dtype != Dtype::kBf16) {
      fail("scale2_dtype must be fp32, fp16 or bf16, got '" + *scale2 + "'");
    }
    if (!scale_dtype) fail("scale2_dtype needs scales");
    if (scale2_extent < 0 || (scale2_extent > 0 && scale2_extent < k && scale2_extent % group != 0)) {
      fail("scale2_extent must be a multiple of the group, got " + std::to_string(scale2_extent));
    }
    if (scale2_extent == 0 && *scale2_dtype != Dtype::kF32) fail("scale2_dtype of the whole weight must be fp32");
  }

  int64_t groups() const { return ceil_div(k, group); }
  int64_t code_bytes() const { return packed_bytes(n, k, bits); }
  int64_t lane_terms() const { return num_blocks(n) * groups() * kBlockN; }
  bool has_zeros2() const { return scale2_dtype && zero == ZeroMode::kAdd; }
  int64_t table_size() const {
    return scope == Scope::kShared ? int64_t{1} << bits : (num_blocks(n) * table_groups << bits) * kBlockN;
  }

  Desc desc(Op op, Dtype x, int64_t m, int threads) const {
    if (op == Op::kLinear && int8_x && x != Dtype::kB1) x = Dtype::kI8;
    return {op, x, codec, bits, scope, zero, m, n, k, group, threads, bf16_table};
  }

  Launch launch(uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t scales2,
                uint64_t zeros2) const {
    Launch l{};
    l.n = n;
    l.k = k;
    l.group = group;
    l.num_groups = groups();
    l.codes = pointer<const uint8_t>(codes);
    l.scales = scale_dtype ? pointer<const void>(scales) : nullptr;
    l.scale_dtype = scale_dtype.value_or(Dtype::kF32);
    l.zeros = pointer<const void>(zeros);
    l.zero_dtype = zero_dtype.value_or(Dtype::kF32);
    l.zero = zero;
    l.table = pointer<const float>(table);
    l.table_groups = table_groups;
    l.table_step = table_step;
    if (scale2_dtype) {
      l.scales2 = pointer<const void>(scales2);
      l.zeros2 = has_zeros2() ? pointer<const void>(zeros2) : nullptr;
      l.second_dtype = *scale2_dtype;
      if (scale2_extent > 0) {
        l.super_groups = scale2_extent < k ? scale2_extent / group : l.num_groups;
        l.num_supers = ceil_div(l.num_groups, l.super_groups);
      }
    }
    return l;
  }

  DecoderLinear decoder_linear(uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t scales2,
                               uint64_t zeros2, uint64_t bias, int bias_dtype, float x_scale) const {
    DecoderLinear linear{launch(codes, scales, zeros, table, scales2, zeros2), desc(Op::kLinear, Dtype::kF32, 1, 1),
                         nullptr, x_scale};
    linear.launch.bias = pointer<const void>(bias);
    linear.launch.bias_dtype = static_cast<Dtype>(bias_dtype);
    return linear;
  }

  const Kernel& choose(const Desc& d, int index) const {
    if (index >= 0) {
      if (index >= static_cast<int>(kernels().size()))
        fail("kernel must be the index of an entry of kernels() that is not for FP8 products");
      const Kernel& k = *kernels()[index];
      if (const char* why = rejection(k, d, detect_isa())) fail(std::string(k.name) + ": " + why);
      return k;
    }
    const Kernel* k = select(d, active_isa());
    if (!k) fail("no kernel of this CPU serves this request");
    return *k;
  }

  Call call(uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t codes, uint64_t scales, uint64_t zeros,
            uint64_t table, uint64_t scales2, uint64_t zeros2, uint64_t bias, int bias_dtype, uint64_t out, int threads,
            int index) const {
    Launch l = launch(codes, scales, zeros, table, scales2, zeros2);
    l.m = m;
    l.x = pointer<const void>(x);
    l.x_dtype = l.out_dtype = static_cast<Dtype>(x_dtype);
    l.x_stride = x_stride;
    l.bias = pointer<const void>(bias);
    l.bias_dtype = static_cast<Dtype>(bias_dtype);
    l.out = pointer<void>(out);
    l.out_stride = n;
    return {&choose(desc(Op::kLinear, l.x_dtype, m, threads), index), l};
  }

  void linear(uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t codes, uint64_t scales, uint64_t zeros,
              uint64_t table, uint64_t scales2, uint64_t zeros2, uint64_t bias, int bias_dtype, uint64_t out,
              int threads, int index) const {
    Call c = call(x, x_dtype, m, x_stride, codes, scales, zeros, table, scales2, zeros2, bias, bias_dtype, out, threads,
                  index);
    py::gil_scoped_release unlocked;
    run_many({&c, 1}, threads);
  }

  // `linear` with what follows it, stored as `out_dtype`.
  void linear_epilogue(uint64_t x, int x_dtype, int64_t m, int64_t x_stride, uint64_t codes, uint64_t scales,
                       uint64_t zeros, uint64_t table, uint64_t scales2, uint64_t zeros2, uint64_t bias, int bias_dtype,
                       uint64_t out, int out_dtype, int threads, int index, int activation, uint64_t gate,
                       int64_t gate_stride, uint64_t residual, int64_t residual_stride, int epilogue_dtype) const {
    if (activation < 0 || activation > static_cast<int>(Activation::kGeluTanh)) fail("activation is out of range");
    Call c = call(x, x_dtype, m, x_stride, codes, scales, zeros, table, scales2, zeros2, bias, bias_dtype, out, threads,
                  index);
    const Epilogue epilogue{
        static_cast<Activation>(activation), pointer<const void>(gate), gate_stride,
        pointer<const void>(residual),       residual_stride,           static_cast<Dtype>(epilogue_dtype)};
    c.launch.epilogue = &epilogue;
    c.launch.out_dtype = static_cast<Dtype>(out_dtype);
    py::gil_scoped_release unlocked;
    run_many({&c, 1}, threads);
  }

  // x is int8 or b1. x_scales are (m), or (m, groups) if x_group_scales; int8 out holds y / out_scale.
  void linear_quantized(uint64_t x, int x_dtype, uint64_t x_scales, bool x_group_scales, int64_t m, int64_t x_stride,
                        uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t scales2,
                        uint64_t zeros2, uint64_t bias, int bias_dtype, uint64_t out, int out_dtype, float out_scale,
                        int threads, int index) const {
    Launch l = launch(codes, scales, zeros, table, scales2, zeros2);
    l.m = m;
    l.x = pointer<const void>(x);
    l.x_dtype = static_cast<Dtype>(x_dtype);
    l.x_scales = pointer<float>(x_scales);
    l.x_group_scales = x_group_scales;
    l.x_stride = x_stride;
    l.bias = pointer<const void>(bias);
    l.bias_dtype = static_cast<Dtype>(bias_dtype);
    l.out = pointer<void>(out);
    l.out_dtype = static_cast<Dtype>(out_dtype);
    l.out_stride = n;
    l.out_inverse = 1.0f / out_scale;
    const Kernel& kernel = choose(desc(Op::kLinear, l.x_dtype, m, threads), index);
    py::gil_scoped_release unlocked;
    run(kernel, l, threads);
  }

  void dequantize(uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table, uint64_t scales2, uint64_t zeros2,
                  uint64_t out, int out_dtype, int threads, int index) const {
    Launch l = launch(codes, scales, zeros, table, scales2, zeros2);
    l.m = 1;
    l.out = pointer<void>(out);
    l.out_dtype = static_cast<Dtype>(out_dtype);
    l.out_stride = k;
    const Kernel& kernel = choose(desc(Op::kDequantize, l.out_dtype, 1, threads), index);
    py::gil_scoped_release unlocked;
    run(kernel, l, threads);
  }

  void embedding(uint64_t indices, int64_t count, uint64_t codes, uint64_t scales, uint64_t zeros, uint64_t table,
                 uint64_t scales2, uint64_t zeros2, uint64_t out, int out_dtype, int threads) const {
    Launch l = launch(codes, scales, zeros, table, scales2, zeros2);
    l.out = pointer<void>(out);
    l.out_dtype = static_cast<Dtype>(out_dtype);
    l.out_stride = k;
    py::gil_scoped_release unlocked;
    embed(l, bits, scope, pointer<const int64_t>(indices), count, threads);
  }

  // y = x W^T + bias on numpy arrays, fp32. Scales and zeros in fp32 lanes layout.
  Array<float> linear_numpy(const Array<float>& x, const Array<uint8_t>& codes, const Array<float>& table,
                            const std::optional<Array<float>>& scales, const std::optional<Array<float>>& zeros,
                            const std::optional<Array<float>>& bias, int threads) const {
    if (x.ndim() != 2 || x.shape(1) != k)
      fail("x must have shape (m, " + std::to_string(k) + "), got " + shape_string(x));
    const auto want = [](const char* name, const py::array& a, int64_t size) {
      if (a.size() != size) {
        fail(std::string(name) + " must have " + std::to_string(size) + " elements, got shape " + shape_string(a));
      }
    };
    want("codes", codes, code_bytes());
    want("table", table, table_size());
    if (scales.has_value() != scale_dtype.has_value())
      fail("scales must be given if and only if the weight has a scale dtype");
    if (zeros.has_value() != zero_dtype.has_value()) fail("zeros must be given if and only if the weight has zeros");
    if (scale_dtype.value_or(Dtype::kF32) != Dtype::kF32 || zero_dtype.value_or(Dtype::kF32) != Dtype::kF32 ||
        scale2_dtype) {
      fail("scales and zeros of the numpy call are fp32; make the Weight with fp32");
    }
    if (scales) want("scales", *scales, lane_terms());
    if (zeros) want("zeros", *zeros, lane_terms());
    if (bias) want("bias", *bias, n);
    Array<float> out({x.shape(0), static_cast<py::ssize_t>(n)});
    const auto address = [](const py::array& a) {
      return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(a.data()));
    };
    linear(address(x), 0, x.shape(0), k, address(codes), scales ? address(*scales) : 0, zeros ? address(*zeros) : 0,
           address(table), 0, 0, bias ? address(*bias) : 0, 0, address(out), threads, -1);
    return out;
  }

  std::string selected(const std::string& op, const std::string& x, int64_t m, int threads) const {
    const Kernel* k = select(desc(op_of(op), dtype_of(x), m, threads), active_isa());
    return k ? k->name : "";
  }

  // (name, estimated ns or None, threads or None, reason or None) of every kernel of the op.
  py::list explain(const std::string& op, const std::string& x, int64_t m, int threads) const {
    const Desc d = desc(op_of(op), dtype_of(x), m, threads);
    py::list found;
    for (const Kernel* k : kernels()) {
      if (k->op != d.op || k->bits != bits) continue;
      const char* why = rejection(*k, d, active_isa());
      if (why) {
        found.append(py::make_tuple(k->name, py::none(), py::none(), why));
      } else {
        found.append(py::make_tuple(k->name, cost(*k, d), threads_for(*k, d), py::none()));
      }
    }
    return found;
  }
};

// y_i = x W_i^T + bias_i in one parallel region. Each entry is (weight, codes, scales, zeros, table, scales2, zeros2,
// bias, bias dtype, out).
void linear_many(uint64_t x, int x_dtype, int64_t m, int64_t x_stride, const py::list& entries, int threads) {
  std::vector<Call> calls;
  calls.reserve(entries.size());
  for (const py::handle& entry : entries) {
    const auto e = py::reinterpret_borrow<py::tuple>(entry);
    const auto address = [&](int i) { return e[i].cast<uint64_t>(); };
    const Weight& w = e[0].cast<const Weight&>();
    calls.push_back(w.call(x, x_dtype, m, x_stride, address(1), address(2), address(3), address(4), address(5),
                           address(6), address(7), e[8].cast<int>(), address(9), threads, -1));
  }
  py::gil_scoped_release unlocked;
  run_many(calls, threads);
}

// The names of the kernels that ran since the last call, in the order of the table.
std::vector<std::string> py_take_kernels_run() {
  const std::vector<const Kernel*> ran = take_kernels_run();
  std::vector<std::string> names;
  for (const Kernel* k : kernels()) {
    if (std::find(ran.begin(), ran.end(), k) != ran.end()) names.emplace_back(k->name);
  }
  return names;
}

py::list py_kernels() {
  py::list entries;
  for (const Kernel* k : kernels()) {
    py::dict entry;
    entry["index"] = entries.size();
    entry["name"] = k->name;
    entry["op"] = k->op == Op::kLinear ? "linear" : "dequantize";
    entry["compute"] = dtype_name(k->compute);
    entry["codec"] = kCodecNames[static_cast<int>(k->codec)];
    entry["bits"] = k->bits;
    entry["scope"] = k->scope == Scope::kShared ? "shared" : "column";
    entry["isa"] = isa_name(k->isa);
    entry["available"] = (detect_isa() & k->isa) != 0;
    entry["group_multiple"] = k->chunk_groups ? k->span : 1;
    entry["half_groups"] = k->half_groups;
    entry["bf16_table"] = k->bf16_table;
    py::list x;
    for (Dtype d : {Dtype::kF32, Dtype::kBf16, Dtype::kF16, Dtype::kI8, Dtype::kB1}) {
      if (k->exact_x[static_cast<int>(d)]) x.append(dtype_name(d));
    }
    entry["x"] = x;
    entries.append(entry);
  }
  append_fp8_matmul_kernels(entries);
  return entries;
}

std::vector<std::string> isa_names(uint32_t mask) {
  std::vector<std::string> names;
  for (Isa isa : {kScalar, kAvx2, kAvx512, kAvx512Bf16, kAvx512Vnni, kAvx512Vpopcntdq}) {
    if (mask & isa) names.push_back(isa_name(isa));
  }
  return names;
}

Array<float> py_kmeans_1d(const Array<float>& values, const std::optional<Array<double>>& weights, int k) {
  if (values.ndim() != 1 || values.size() == 0)
    fail("values must be 1-D and not empty, got shape " + shape_string(values));
  if (k < 1 || k > 256) fail("k must be 1 to 256, got " + std::to_string(k));
  if (weights && weights->size() != values.size())
    fail("weights must be as long as values, got shape " + shape_string(*weights));
  Array<float> centers(k);
  const float* v = values.data();
  const double* w = weights ? weights->data() : nullptr;
  float* c = centers.mutable_data();
  const int64_t n = values.size();
  run_unlocked([&](Stop* stop) { kmeans_rows(v, w, 1, n, k, c, 1, stop); });
  return centers;
}

Array<float> py_kmeans_rows(const Array<float>& values, const std::optional<Array<double>>& weights, int k,
                            int threads) {
  if (values.ndim() != 2 || values.size() == 0) {
    fail("values must be 2-D and not empty, got shape " + shape_string(values));
  }
  if (k < 1 || k > 256) fail("k must be 1 to 256, got " + std::to_string(k));
  const int64_t rows = values.shape(0), n = values.shape(1);
  if (weights) want_shape("weights", *weights, rows, n);
  Array<float> centers({rows, static_cast<int64_t>(k)});
  const float* v = values.data();
  const double* w = weights ? weights->data() : nullptr;
  float* c = centers.mutable_data();
  run_unlocked([&](Stop* stop) { kmeans_rows(v, w, rows, n, k, c, threads, stop); });
  return centers;
}

}  // namespace
}  // namespace lowbit

PYBIND11_MODULE(_C, m) {
  using namespace lowbit;
  m.doc() = "Compiled kernels of lowbit. Works with numpy alone.";
  // A wrong LOWBIT_ISA must stop the import, not the first call.
  active_isa();
  m.def("kernels", &py_kernels,
        "Every entry of the kernel table, and those of FP8 products, which `Weight` cannot run.");
  m.def("take_kernels_run", &py_take_kernels_run,
        "Names of the kernels that ran since the last call of this function, on any thread.");
  m.def("usable_threads", &usable_threads, py::arg("threads"), "How many threads a call gets: one after a fork.");
  m.def("isa_detected", [] { return isa_names(detect_isa()); });
  m.def("isa_active", [] { return isa_names(active_isa()); });
  m.def("isa_capped", [](const std::vector<std::string>& detected, const std::string& value) {
    uint32_t mask = 0;
    for (Isa isa : {kScalar, kAvx2, kAvx512, kAvx512Bf16, kAvx512Vnni, kAvx512Vpopcntdq}) {
      for (const std::string& name : detected) mask |= name == isa_name(isa) ? uint32_t{isa} : 0u;
    }
    return isa_names(cap_isa(mask, value.c_str()));
  });
  m.def("kmeans_1d", &py_kmeans_1d, py::arg("values"), py::arg("weights"), py::arg("k"));
  m.def("kmeans_rows", &py_kmeans_rows, py::arg("values"), py::arg("weights"), py::arg("k"), py::arg("threads") = 1);
  bind_activations(m);
  bind_fp8(m);
  bind_fp8_matmul(m);
  m.attr("BLOCK_N") = kBlockN;
  m.attr("CHUNK_K") = kChunkK;

  bind_decoder(m);
  bind_optim(m);
  bind_outliers(m);
  bind_pack(m);
  py::class_<Weight>(m, "Weight", "What a weight in n16 layout is, apart from its bytes (csrc/kernel.h).")
      .def(py::init<int64_t, int64_t, int, int64_t, const std::string&, bool, int64_t, const std::string&,
                    std::optional<std::string>, std::optional<std::string>, std::optional<std::string>, int64_t, bool,
                    float, bool>(),
           py::kw_only(), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group"), py::arg("codec") = "lut",
           py::arg("column_table") = false, py::arg("table_groups") = 1, py::arg("zero") = "none",
           py::arg("scale_dtype") = py::none(), py::arg("zero_dtype") = py::none(),
           py::arg("scale2_dtype") = py::none(), py::arg("scale2_extent") = 0, py::arg("int8_x") = false,
           py::arg("table_step") = 0.0f, py::arg("bf16_table") = false)
      .def("linear_ptr", &Weight::linear)
      .def("linear_epilogue_ptr", &Weight::linear_epilogue)
      .def("linear_quantized_ptr", &Weight::linear_quantized)
      .def("dequantize_ptr", &Weight::dequantize)
      .def("embedding_ptr", &Weight::embedding)
      .def("decoder_linear", &Weight::decoder_linear)
      .def("linear", &Weight::linear_numpy, py::arg("x"), py::arg("codes"), py::arg("table"),
           py::arg("scales") = py::none(), py::arg("zeros") = py::none(), py::arg("bias") = py::none(),
           py::arg("threads") = 1)
      .def("select", &Weight::selected, py::arg("op"), py::arg("x"), py::arg("m"), py::arg("threads") = 1)
      .def("explain", &Weight::explain, py::arg("op"), py::arg("x"), py::arg("m"), py::arg("threads") = 1)
      .def_property_readonly("code_bytes", &Weight::code_bytes)
      .def_property_readonly("lane_terms", &Weight::lane_terms)
      .def_property_readonly("table_size", &Weight::table_size);
  m.def("linear_many_ptr", &linear_many);
  m.def("plan", [](const Weight& w) {
    return make_plan({w.desc(Op::kLinear, Dtype::kF32, 0, 1),
                      w.launch(0, 0, 0, 0, 0, 0),
                      w.code_bytes(),
                      w.scale_dtype.has_value(),
                      w.zero_dtype.has_value(),
                      w.scale2_dtype.has_value(),
                      w.has_zeros2(),
                      {}});
  });
  bind_tensor_calls(m);
}
