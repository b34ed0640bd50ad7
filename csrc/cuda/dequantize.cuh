// The weight, or some of its rows, as floats: two weights a thread. Reads through the L1 cache; every bit width at run
// time.
#pragma once

#include "codecs.cuh"

namespace lowbit::cuda {

__global__ void __launch_bounds__(256) dequantize_kernel(const Dequantize p) {
  const int64_t pairs = ceil_div(p.k, 2), tiles_k = ceil_div(p.k, kTileK);
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x;
  if (i >= p.rows * pairs) return;
  const int64_t out_row = i / pairs, row = p.indices ? p.indices[out_row] : out_row;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t k = i % pairs * 2 + e;
    if (k >= p.k) break;
    float v = __ldg(p.table + code_at(p.codes, p.bits, row, k, tiles_k));
    const int64_t at = scale_at(row / kTileN, k / p.group, p.num_groups) + row % kTileN;
    const float zero = p.zero == Zero::kNone ? 0.0f : load_float(p.zeros, p.zero_type, at);
    if (p.zero == Zero::kInt || p.zero == Zero::kSubtract) v = __fsub_rn(v, zero);
    if (p.scales) v = __fmul_rn(load_float(p.scales, p.scale_type, at), v);
    if (p.zero == Zero::kAdd) v = __fadd_rn(v, zero);
    store_float(p.out, p.out_type, out_row * p.k + k, v);
  }
}

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
