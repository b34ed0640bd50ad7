#include "dequantize.cuh"
#include "launch.cuh"

namespace lowbit::cuda {

void dequantize(const Dequantize& p, cudaStream_t stream) {
  const int64_t threads = p.rows * ceil_div(p.k, 2);
  if (threads == 0) return;
  dequantize_kernel<<<static_cast<unsigned>(ceil_div(threads, 256)), 256, 0, stream>>>(p);
  check(cudaGetLastError(), "dequantize kernel");
}

void add_parts(const Linear& p, int splits, cudaStream_t stream) {
  add_parts_kernel<<<static_cast<unsigned>(ceil_div(p.m * p.n, 256)), 256, 0, stream>>>(p, splits);
  check(cudaGetLastError(), "add_parts kernel");
}

void sum_groups(const void* x, Type type, int64_t x_stride, int64_t m, int64_t k, int64_t group, float* sums,
                cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(m * ceil_div(k, group), 256 / kLanes));
  if (type == Type::kBf16)
    sum_groups_kernel<<<blocks, 256, 0, stream>>>(static_cast<const __nv_bfloat16*>(x), x_stride, m, k, group, sums);
  else
    sum_groups_kernel<<<blocks, 256, 0, stream>>>(static_cast<const __half*>(x), x_stride, m, k, group, sums);
  check(cudaGetLastError(), "sum_groups kernel");
}

}  // namespace lowbit::cuda
