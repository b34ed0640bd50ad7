// The Python class `lowbit._C.Decoder`. Addresses for torch's tensors; the caller keeps them alive.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "bindings.h"
#include "decoder.h"

namespace lowbit {
namespace {

const void* address(uint64_t a) { return reinterpret_cast<const void*>(static_cast<uintptr_t>(a)); }

DecoderLinear dense_linear(int64_t n, int64_t k, uint64_t weight, uint64_t bias, int bias_dtype) {
  want_positive({{"n", n}, {"k", k}});
  DecoderLinear linear{};
  linear.launch.n = n;
  linear.launch.k = k;
  linear.launch.bias = address(bias);
  linear.launch.bias_dtype = static_cast<Dtype>(bias_dtype);
  linear.dense = address(weight);
  return linear;
}

using Layer = std::tuple<uint64_t, uint64_t, std::array<DecoderLinear, 7>>;

std::unique_ptr<Decoder> make_decoder(int dtype, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                      int64_t intermediate, int64_t vocab, int64_t max_length, float eps, float scale,
                                      int threads, const DecoderLinear& embedding, const std::vector<Layer>& layers,
                                      uint64_t norm, const DecoderLinear& head, uint64_t cos, uint64_t sin,
                                      uint64_t logits) {
  want_positive({{"hidden", hidden},
                 {"heads", heads},
                 {"kv_heads", kv_heads},
                 {"head_dim", head_dim},
                 {"intermediate", intermediate},
                 {"vocab", vocab},
                 {"max_length", max_length}});
  if (heads % kv_heads != 0) {
    fail("heads must be a multiple of kv_heads, got " + std::to_string(heads) + " and " + std::to_string(kv_heads));
  }
  const DecoderConfig config{static_cast<Dtype>(dtype),
                             hidden,
                             heads,
                             kv_heads,
                             head_dim,
                             intermediate,
                             vocab,
                             max_length,
                             eps,
                             scale,
                             threads};
  DecoderModel model{};
  model.embedding = embedding;
  model.head = head;
  for (const auto& [input_norm, mlp_norm, l] : layers) {
    model.layers.push_back({address(input_norm), address(mlp_norm), l[0], l[1], l[2], l[3], l[4], l[5], l[6]});
  }
  model.norm = address(norm);
  model.cos = static_cast<const float*>(address(cos));
  model.sin = static_cast<const float*>(address(sin));
  model.logits = const_cast<void*>(address(logits));
  return std::make_unique<Decoder>(config, model);
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<DecoderLinear>(m, "DecoderLinear", "A weight as csrc/decoder.h takes it; made by Weight or dense_linear.");
  m.def("dense_linear", &dense_linear);
  py::class_<Decoder>(m, "Decoder", "A Llama-like decoder over packed weights (csrc/decoder.h).")
      .def(py::init(&make_decoder), py::kw_only(), py::arg("dtype"), py::arg("hidden"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("intermediate"), py::arg("vocab"), py::arg("max_length"),
           py::arg("eps"), py::arg("scale"), py::arg("threads"), py::arg("embedding"), py::arg("layers"),
           py::arg("norm"), py::arg("head"), py::arg("cos"), py::arg("sin"), py::arg("logits"))
      .def("run_ptr",
           [](Decoder& d, uint64_t ids, int64_t count, int64_t position) {
             run_unlocked([&](Stop* stop) { d.run(static_cast<const int64_t*>(address(ids)), count, position, stop); });
           })
      .def("likeliest", &Decoder::likeliest, py::call_guard<py::gil_scoped_release>());
}

}  // namespace lowbit
