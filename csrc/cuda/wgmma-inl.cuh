// The launches of the wgmma kernels for one type: included by wgmma_<type>.cu, which are compiled for sm_90a alone.
#pragma once

#include "gemm_wgmma.cuh"
#include "tensor_map.cuh"

namespace lowbit::cuda {

template <class T, int kBits, int kCols>
void launch_wgmma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  using Tile = WgmmaTile<kBits, kCols>;
  allow_shared<wgmma_kernel<T, kBits, kCols>>(device, Tile::kShared);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)), static_cast<unsigned>(ceil_div(p.m, kCols)),
                    c.splits);
  const auto type = Half<T>::kType == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  Maps maps{};
  maps.x = tensor_map<2>(type, p.x, {p.k, p.m}, {p.x_stride * 2}, {kTileK, kCols}, true);
  maps.codes = codes_map(p, Tile::kRowTiles, 1);
  if (p.group < p.k) {
    if (p.scales) maps.scales = values_map(p, p.scales, p.scale_type, Tile::kRowTiles, 1);
    if (p.zero == Zero::kInt) maps.zeros = values_map(p, p.zeros, Type::kI8, Tile::kRowTiles, 1);
  }
  wgmma_kernel<T, kBits, kCols><<<blocks, Tile::kThreads, Tile::kShared, stream>>>(maps, p, run_of(p, c));
  check(cudaGetLastError(), "wgmma kernel");
  if (p.parts) add_parts(p, c.splits, stream);
}

template <class T>
void wgmma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  for_bits(p.bits, [&]<int kBits>() {
    return c.tiles_m == 8 ? launch_wgmma<T, kBits, 64>(p, c, device, stream)
                          : launch_wgmma<T, kBits, 128>(p, c, device, stream);
  });
}

}  // namespace lowbit::cuda
