// What every launch does: shared memory beyond 48 KiB is asked for once for each kernel and device, errors throw.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "heuristics.h"
#include "kernels.h"

namespace lowbit::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// cuTensorMapEncodeTiled of the driver; null if it has none.
inline void* encode_tiled_address() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
}

template <auto kKernel>
void allow_shared(int device, int bytes) {
  constexpr int kDevices = 64;
  static std::atomic<int> allowed[kDevices];
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  check(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "shared memory of a kernel");
  if (device < kDevices) allowed[device].store(bytes, std::memory_order_relaxed);
}

}  // namespace lowbit::cuda
