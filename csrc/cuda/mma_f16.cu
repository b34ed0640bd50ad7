#include "mma-inl.cuh"

namespace lowbit::cuda {
void mma_f16(const Linear& p, const Config& c, int device, cudaStream_t s) { mma<__half>(p, c, device, s); }
}  // namespace lowbit::cuda
