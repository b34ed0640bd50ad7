// The launches of the wgmma kernels for one type: included by wgmma_<type>.cu, which are compiled for sm_90a alone.
#pragma once

#include "gemm_wgmma.cuh"
#include "tensor_map.cuh"

namespace lowbit::cuda {

template <class T, int kBits, int kCols>
void launch_wgmma(const Linear& p, int device, cudaStream_t stream) {
  using Tile = WgmmaTile<kBits, kCols>;
  allow_shared<wgmma_kernel<T, kBits, kCols>>(device, Tile::kShared);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)), static_cast<unsigned>(ceil_div(p.m, kCols)));
  const auto type = Half<T>::kType == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMap x = tensor_map(type, p.x, p.k, p.m, p.x_stride * 2, kTileK, kCols);
  wgmma_kernel<T, kBits, kCols><<<blocks, Tile::kThreads, Tile::kShared, stream>>>(x, p);
  check(cudaGetLastError(), "wgmma kernel");
}

template <class T>
void wgmma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  for_bits(p.bits, [&]<int kBits>() {
    return c.tiles_m == 8 ? launch_wgmma<T, kBits, 64>(p, device, stream)
                          : launch_wgmma<T, kBits, 128>(p, device, stream);
  });
}

}  // namespace lowbit::cuda
