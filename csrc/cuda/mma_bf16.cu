#include "mma-inl.cuh"

namespace lowbit::cuda {
void mma_bf16(const Linear& p, const Config& c, int device, cudaStream_t s) { mma<__nv_bfloat16>(p, c, device, s); }
}  // namespace lowbit::cuda
