#include "wgmma-inl.cuh"

namespace lowbit::cuda {
void wgmma_bf16(const Linear& p, const Config& c, int device, cudaStream_t s) { wgmma<__nv_bfloat16>(p, c, device, s); }
}  // namespace lowbit::cuda
