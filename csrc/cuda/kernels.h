// The launches: each family's kernels are compiled in files of their own. Errors throw std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include "fp8.h"
#include "launch.h"

namespace lowbit::cuda {

// Attributes of one of the mma kernels, all of which are compiled alike.
cudaError_t mma_attributes(cudaFuncAttributes*);
void mma_bf16(const Linear&, const Config&, int device, cudaStream_t);
void mma_f16(const Linear&, const Config&, int device, cudaStream_t);
void wgmma_bf16(const Linear&, const Config&, int device, cudaStream_t);
void wgmma_f16(const Linear&, const Config&, int device, cudaStream_t);
void add_parts(const Linear&, int splits, cudaStream_t);
void sum_groups(const void* x, Type type, int64_t x_stride, int64_t m, int64_t k, int64_t group, float* sums,
                cudaStream_t);
void dequantize(const Dequantize&, cudaStream_t);
void fp8_product(const Fp8Product&, int cols, int device, cudaStream_t);

}  // namespace lowbit::cuda
