// The launches of the mma kernels for one type: included by mma_<type>.cu.
#pragma once

#include "gemm_mma.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace lowbit::cuda {

template <class T, int kBits, int kTilesM, bool kFine>
void launch_mma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  using Tile = MmaTile<kBits, kTilesM>;
  allow_shared<mma_kernel<T, kBits, kTilesM, kFine>>(device, c.shared);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)), c.splits,
                    static_cast<unsigned>(ceil_div(p.m, Tile::kCols)));
  const int groups = stage_groups<Tile>(groups_per_tile(p.group, p.k), tiles_per_group(p.group));
  Maps maps{};
  if (c.bulk) {
    const int64_t tiles_k = ceil_div(p.k, kTileK);
    // K tiles of x stand behind each other, and so do the rows of each of them. cuda.h describes strides that include
    // the one before, which these do for one row; drivers take the others as well.
    maps.x = tensor_map<3>(CU_TENSOR_MAP_DATA_TYPE_UINT16, p.x, {kTileK, p.m, tiles_k},
                           {p.m > 1 ? p.x_stride * 2 : kXRowBytes, kXRowBytes},
                           {kTileK, static_cast<int>(p.m < Tile::kCols ? p.m : Tile::kCols), Tile::kStageTiles}, true);
    maps.codes = codes_map(p, Tile::kRowTilesOfBlock, Tile::kStageTiles);
    if (groups && p.scales) maps.scales = values_map(p, p.scales, p.scale_type, Tile::kRowTilesOfBlock, groups);
    if (groups && p.zero == Zero::kInt) maps.zeros = values_map(p, p.zeros, Type::kI8, Tile::kRowTilesOfBlock, groups);
  }
  mma_kernel<T, kBits, kTilesM, kFine>
      <<<blocks, Tile::threads(c.bulk), c.shared, stream>>>(maps, p, run_of(p, c, groups));
  check(cudaGetLastError(), "mma kernel");
  if (p.parts) add_parts(p, c.splits, stream);
}

template <class T>
void mma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  const auto launch = [&]<int kBits, int kTilesM>() {
    return groups_per_tile(p.group, p.k) > 1 ? launch_mma<T, kBits, kTilesM, true>(p, c, device, stream)
                                             : launch_mma<T, kBits, kTilesM, false>(p, c, device, stream);
  };
  for_bits(p.bits, [&]<int kBits>() {
    switch (c.tiles_m) {
      case 1:
        return launch.template operator()<kBits, 1>();
      case 2:
        return launch.template operator()<kBits, 2>();
      case 4:
        return launch.template operator()<kBits, 4>();
      default:
        return launch.template operator()<kBits, 8>();
    }
  });
}

}  // namespace lowbit::cuda
