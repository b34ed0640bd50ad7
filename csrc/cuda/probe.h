// Whether the kernels of this build run on a device, from what the driver says: plain text on the host, tested without
// a GPU.
#pragma once

#include <string>

namespace lowbit::cuda {

// Versions are those of CUDA, 1000 * major + 10 * minor; architectures 10 * major + minor.
struct Facts {
  int driver = 0;                  // the newest that the driver knows; 0 without one
  int runtime = 0;                 // that which the kernels were built with
  int device = 0;                  // architecture of the device
  int code = 0;                    // that which the code of the mma kernels was compiled for
  bool describes_tensors = false;  // the driver has cuTensorMapEncodeTiled
  std::string failed;              // what loading a kernel failed with; empty if it did not
};

inline std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// Why the kernels do not run; empty if they do.
inline std::string obstacle(const Facts& f) {
  if (f.driver == 0) return "there is no NVIDIA driver";
  const std::string here =
      "the driver knows CUDA " + version(f.driver) + ", the kernels were built with CUDA " + version(f.runtime);
  if (!f.failed.empty())
    return "they do not load on " + (f.device ? "sm_" + std::to_string(f.device) : "the GPU") + " (" + f.failed +
           "): " + here;
  // The code for sm_90 and later copies with descriptions of tensors; that for older ones runs without.
  if (f.code >= 90 && !f.describes_tensors)
    return "the driver cannot describe tensors (cuTensorMapEncodeTiled): " + here;
  return "";
}

}  // namespace lowbit::cuda
