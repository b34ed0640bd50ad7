// The small passes around a product: parts of K added up, and the sums of x that float zeros meet.
#pragma once

#include "codecs.cuh"

namespace lowbit::cuda {

// out = the sum of the parts, in order, + bias.
__global__ void __launch_bounds__(256) add_parts_kernel(const Linear p, int splits) {
  const int64_t size = p.m * p.n, i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (i >= size) return;
  float v = p.parts[i];
  for (int s = 1; s < splits; ++s) v += p.parts[s * size + i];
  if (p.bias) v += load_float(p.bias, p.bias_type, i % p.n);
  store_float(p.out, p.out_type, i, v);
}

// Sums of x over each group: (num_groups, m).
template <class T>
__global__ void __launch_bounds__(256)
    sum_groups_kernel(const T* x, int64_t x_stride, int64_t m, int64_t k, int64_t group, float* sums) {
  const int64_t i = blockIdx.x * int64_t{256 / kLanes} + threadIdx.x / kLanes;  // a warp each
  if (i >= m * ceil_div(k, group)) return;
  const int64_t row = i % m, first = i / m * group, last = min(first + group, k);
  float v = 0;
  for (int64_t j = first + threadIdx.x % kLanes; j < last; j += kLanes) v += static_cast<float>(x[row * x_stride + j]);
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % kLanes == 0) sums[i] = v;
}

}  // namespace lowbit::cuda
