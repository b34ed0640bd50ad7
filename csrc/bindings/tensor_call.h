// Calls on a framework's tensors; tensor_call.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "core/dispatch.h"

namespace lowbit {

// A weight apart from its bytes, and the kernels that were chosen for it last.
struct Plan {
  Desc desc;      // without m and threads; x only if it is kI8
  Launch launch;  // without addresses
  int64_t code_bytes;
  bool has_scales, has_zeros, has_scales2, has_zeros2;
  struct Choice {
    int64_t m = -1;
    int threads = 0;
    const Kernel* kernel = nullptr;
  } chosen[3];  // by dtype of x
};

// Keeps a copy, for linear_tensors.
pybind11::capsule make_plan(const Plan& plan);
void bind_tensor_calls(pybind11::module_& m);

}  // namespace lowbit
