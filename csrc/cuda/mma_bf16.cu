#include "mma-inl.cuh"

namespace lowbit::cuda {
void mma_bf16(const Linear& p, const Config& c, int device, cudaStream_t s) { mma<__nv_bfloat16>(p, c, device, s); }
cudaError_t mma_attributes(cudaFuncAttributes* a) {
  return cudaFuncGetAttributes(a, reinterpret_cast<const void*>(mma_kernel<__nv_bfloat16, 4, 1, false>));
}
}  // namespace lowbit::cuda
