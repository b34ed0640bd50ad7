#include "wgmma-inl.cuh"

namespace lowbit::cuda {
void wgmma_f16(const Linear& p, const Config& c, int device, cudaStream_t s) { wgmma<__half>(p, c, device, s); }
}  // namespace lowbit::cuda
