// The launches of the mma kernels for one type: included by mma_<type>.cu.
#pragma once

#include "gemm_mma.cuh"
#include "launch.cuh"

namespace lowbit::cuda {

template <class T, int kBits, int kTilesM>
void launch_mma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  using Tile = MmaTile<kBits, kTilesM>;
  allow_shared<mma_kernel<T, kBits, kTilesM>>(device, c.shared);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)), c.splits,
                    static_cast<unsigned>(ceil_div(p.m, Tile::kCols)));
  mma_kernel<T, kBits, kTilesM><<<blocks, Tile::kThreads, c.shared, stream>>>(p, c.stages_per_split);
  check(cudaGetLastError(), "mma kernel");
  if (p.parts) add_parts(p, c.splits, stream);
}

template <class T>
void mma(const Linear& p, const Config& c, int device, cudaStream_t stream) {
  for_bits(p.bits, [&]<int kBits>() {
    switch (c.tiles_m) {
      case 1:
        return launch_mma<T, kBits, 1>(p, c, device, stream);
      case 2:
        return launch_mma<T, kBits, 2>(p, c, device, stream);
      case 4:
        return launch_mma<T, kBits, 4>(p, c, device, stream);
      default:
        return launch_mma<T, kBits, 8>(p, c, device, stream);
    }
  });
}

}  // namespace lowbit::cuda
