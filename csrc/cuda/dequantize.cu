#include <algorithm>

#include "dequantize.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace lowbit::cuda {

namespace {

template <class T>
void dequantize_to(const Dequantize& p, cudaStream_t stream) {
  if (p.indices) {
    const int64_t blocks_k = std::min<int64_t>(ceil_div(p.k, 2 * kGatherThreads), 65535);
    const dim3 blocks(static_cast<unsigned>(p.rows), static_cast<unsigned>(blocks_k));
    gather_kernel<T><<<blocks, kGatherThreads, 0, stream>>>(p);
    return;
  }
  using Tile = DequantizeTile<sizeof(T)>;
  const DequantizePlan plan = Tile::plan(p.k, p.group, reinterpret_cast<uint64_t>(p.out));
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows, kTileN) * plan.blocks_k);
  for_bits(p.bits, [&]<int kBits>() { dequantize_kernel<kBits, T><<<blocks, Tile::kThreads, 0, stream>>>(p, plan); });
}

}  // namespace

void dequantize(const Dequantize& p, cudaStream_t stream) {
  if (p.rows == 0 || p.k == 0) return;
  if (p.out_type == Type::kF32)
    dequantize_to<float>(p, stream);
  else if (p.out_type == Type::kBf16)
    dequantize_to<__nv_bfloat16>(p, stream);
  else
    dequantize_to<__half>(p, stream);
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
