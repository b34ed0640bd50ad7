// The Python module `lowbit._C`: the kernel table, instruction sets, and what the other files of this folder bind. Raw
// addresses for torch (the module knows nothing of it), numpy arrays for everybody else. Work runs without the GIL.
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/names.h"
#include "bindings/tensor_call.h"
#include "core/dispatch.h"
#include "core/n16.h"
#include "core/parallel.h"

namespace lowbit {

void bind_activations(py::module_& m);              // activations.cpp
void bind_conv(py::module_& m);                     // conv.cpp
void bind_decoder(py::module_& m);                  // decoder.cpp
void bind_fp8(py::module_& m);                      // fp8.cpp
void bind_fp8_matmul(py::module_& m);               // fp8_matmul.cpp
void bind_kmeans(py::module_& m);                   // kmeans.cpp
void bind_scale_search(py::module_& m);             // scale_search.cpp
void bind_optim(py::module_& m);                    // optim.cpp
void bind_outliers(py::module_& m);                 // sparse.cpp
void bind_pack(py::module_& m);                     // pack.cpp
void bind_structured(py::module_& m);               // structured.cpp
void bind_weights(py::module_& m);                  // weight_calls.cpp
void append_fp8_matmul_kernels(py::list& entries);  // fp8_matmul.cpp

namespace {

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
    entry["scope"] = kScopeNames[static_cast<int>(k->scope)];
    entry["isa"] = isa_name(k->isa);
    entry["available"] = (detect_isa() & k->isa) != 0;
    entry["group_multiple"] = k->chunk_groups ? k->span : 1;
    entry["cost"] = py::make_tuple(std::vector<float>(std::begin(k->cost.rows), std::end(k->cost.rows)),
                                   k->cost.single_end, k->cost.row_end);
    entry["half_groups"] = k->half_groups;
    entry["bf16_table"] = k->bf16_table;
    py::list x;
    for (Dtype d : {Dtype::kF32, Dtype::kBf16, Dtype::kF16, Dtype::kI8, Dtype::kB1}) {
      if (k->exact_x[d]) x.append(dtype_name(d));
    }
    entry["x"] = x;
    entries.append(entry);
  }
  append_fp8_matmul_kernels(entries);
  return entries;
}

std::vector<std::string> isa_names(uint32_t mask) {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (mask & isa) names.push_back(isa_name(isa));
  }
  return names;
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
  m.def("uncrowded_threads", &uncrowded_threads, py::arg("threads"),
        "How many of them a region gets now (core/crowd.h).");
  m.def("note_wait", &note_wait, py::arg("waited_ns"), py::arg("worked_ns"), py::call_guard<py::gil_scoped_release>());
  m.def("waited_for_cores_ns", &waited_for_cores_ns);
  m.def("isa_detected", [] { return isa_names(detect_isa()); });
  m.def("isa_active", [] { return isa_names(active_isa()); });
  m.def("isa_capped", [](const std::vector<std::string>& detected, const std::string& value) {
    uint32_t mask = 0;
    for (Isa isa : kIsas) {
      for (const std::string& name : detected) mask |= name == isa_name(isa) ? uint32_t{isa} : 0u;
    }
    return isa_names(cap_isa(mask, value.c_str()));
  });
  m.attr("BLOCK_N") = kBlockN;
  m.attr("CHUNK_K") = kChunkK;
  bind_activations(m);
  bind_conv(m);
  bind_decoder(m);
  bind_fp8(m);
  bind_fp8_matmul(m);
  bind_kmeans(m);
  bind_scale_search(m);
  bind_optim(m);
  bind_outliers(m);
  bind_pack(m);
  bind_structured(m);
  bind_tensor_calls(m);
  bind_weights(m);
}
