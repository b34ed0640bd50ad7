// The Python class `lowbit._C.Decoder` and the structs that describe one. Addresses for torch's tensors; the caller
// keeps them alive.
#include "decoder/decoder.h"

#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.h"
#include "core/address.h"

#define FIELD(name) config.def_readwrite(#name, &DecoderConfig::name)

namespace lowbit {
namespace {

DecoderLinear dense_linear(int64_t n, int64_t k, uint64_t weight, uint64_t bias, int bias_dtype) {
  want_positive({{"n", n}, {"k", k}});
  DecoderLinear linear{};
  linear.launch.n = n;
  linear.launch.k = k;
  linear.launch.bias = pointer<const void>(bias);
  linear.launch.bias_dtype = static_cast<Dtype>(bias_dtype);
  linear.dense = pointer<const void>(weight);
  return linear;
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  fail("activation must be silu, relu, gelu or gelu_tanh, got '" + name + "'");
}

// A field that Python sets as an address or a code.
template <class Struct, class T>
void address_field(py::class_<Struct>& c, const char* name, T* Struct::* field) {
  c.def_property(
      name, [field](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*field); },
      [field](Struct& s, uint64_t a) { s.*field = pointer<T>(a); });
}

std::unique_ptr<Decoder> make_decoder(const DecoderConfig& c, const DecoderModel& model) {
  want_positive({{"hidden", c.hidden},
                 {"heads", c.heads},
                 {"kv_heads", c.kv_heads},
                 {"head_dim", c.head_dim},
                 {"intermediate", c.intermediate},
                 {"vocab", c.vocab},
                 {"max_length", c.max_length},
                 {"sequences", c.sequences}});
  return std::make_unique<Decoder>(c, model);
}

void bind_structs(py::module_& m) {
  py::class_<DecoderConfig> config(m, "DecoderConfig", "As in csrc/decoder/decoder.h.");
  config.def(py::init<>())
      .def_property(
          "dtype", [](const DecoderConfig& c) { return static_cast<int>(c.dtype); },
          [](DecoderConfig& c, int dtype) { c.dtype = static_cast<Dtype>(dtype); })
      .def_property(
          "cache_dtype", [](const DecoderConfig& c) { return static_cast<int>(c.cache_dtype); },
          [](DecoderConfig& c, int dtype) { c.cache_dtype = static_cast<Dtype>(dtype); })
      .def_property(
          "activation", [](const DecoderConfig& c) { return static_cast<int>(c.activation); },
          [](DecoderConfig& c, const std::string& name) { c.activation = activation_of(name); });
  FIELD(hidden), FIELD(heads), FIELD(kv_heads), FIELD(head_dim), FIELD(intermediate), FIELD(vocab), FIELD(max_length);
  FIELD(eps), FIELD(late_norms), FIELD(score_scale), FIELD(score_cap), FIELD(embedding_scale), FIELD(residual_scale);
  FIELD(logit_divisor), FIELD(logit_cap), FIELD(sequences), FIELD(threads);

  py::class_<DecoderLayer> layer(m, "DecoderLayer", "As in csrc/decoder/decoder.h.");
  layer.def(py::init<>())
      .def_readwrite("rope", &DecoderLayer::rope)
      .def_readwrite("window", &DecoderLayer::window)
      .def_readwrite("qkv", &DecoderLayer::qkv)
      .def_readwrite("gate_up", &DecoderLayer::gate_up)
      .def_readwrite("o", &DecoderLayer::o)
      .def_readwrite("down", &DecoderLayer::down);
  address_field(layer, "input_norm", &DecoderLayer::input_norm);
  address_field(layer, "mlp_norm", &DecoderLayer::mlp_norm);
  address_field(layer, "attention_out_norm", &DecoderLayer::attention_out_norm);
  address_field(layer, "out_norm", &DecoderLayer::out_norm);
  address_field(layer, "q_norm", &DecoderLayer::q_norm);
  address_field(layer, "k_norm", &DecoderLayer::k_norm);
  address_field(layer, "key_balance", &DecoderLayer::key_balance);

  py::class_<DecoderRope> rope(m, "DecoderRope", "As in csrc/decoder/decoder.h.");
  rope.def(py::init<>()).def_readwrite("dim", &DecoderRope::dim);
  address_field(rope, "cos", &DecoderRope::cos);
  address_field(rope, "sin", &DecoderRope::sin);

  py::class_<DecoderModel> model(m, "DecoderModel", "As in csrc/decoder/decoder.h.");
  model.def(py::init<>())
      .def_readwrite("embedding", &DecoderModel::embedding)
      .def_readwrite("head", &DecoderModel::head)
      .def_readwrite("layers", &DecoderModel::layers)
      .def_readwrite("ropes", &DecoderModel::ropes);
  address_field(model, "norm", &DecoderModel::norm);
  address_field(model, "logits", &DecoderModel::logits);
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<DecoderLinear>(m, "DecoderLinear",
                            "A weight as csrc/decoder/decoder.h takes it; made by BoundWeight or dense_linear.");
  m.def("dense_linear", &dense_linear, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("bias"),
        py::arg("bias_dtype"));
  bind_structs(m);
  py::class_<Decoder>(m, "Decoder", "A decoder over packed weights (csrc/decoder/decoder.h).")
      .def(py::init(&make_decoder), py::arg("config"), py::arg("model"))
      .def(
          "run_ptr",
          [](Decoder& d, uint64_t ids, int64_t count, int64_t sequence, int64_t position) {
            run_unlocked([&](Stop* stop) { d.run(pointer<const int64_t>(ids), count, {sequence, position}, stop); });
          },
          py::kw_only(), py::arg("ids"), py::arg("count"), py::arg("sequence"), py::arg("position"))
      .def("step",
           [](Decoder& d, const std::vector<int64_t>& ids, const std::vector<std::pair<int64_t, int64_t>>& places) {
             if (ids.size() != places.size()) fail("ids and places must be of one length");
             std::vector<TokenPlace> at;
             for (const auto& [sequence, position] : places) at.push_back({sequence, position});
             py::gil_scoped_release unlocked;
             d.step(ids.data(), at.data(), static_cast<int64_t>(ids.size()));
           })
      .def("likeliest", &Decoder::likeliest, py::call_guard<py::gil_scoped_release>());
}

}  // namespace lowbit
