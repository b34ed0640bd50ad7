// The launches of the wgmma kernels for one type: included by wgmma_<type>.cu, which are compiled for sm_90a alone.
#pragma once

#include "gemm_wgmma.cuh"
#include "launch.cuh"

namespace lowbit::cuda {

// x (m, k) for the tensor memory accelerator, in tiles of `cols` rows and 64 columns; zero beyond its edges.
template <class T>
CUtensorMap x_map(const Linear& p, int cols) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.m)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.x_stride) * 2};
  const cuuint32_t box[2] = {kTileK, static_cast<cuuint32_t>(cols)}, steps[2] = {1, 1};
  const auto type = Half<T>::kType == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(p.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

template <class T, int kBits, int kCols>
void launch_wgmma(const Linear& p, int device, cudaStream_t stream) {
  using Tile = WgmmaTile<kBits, kCols>;
  allow_shared<wgmma_kernel<T, kBits, kCols>>(device, Tile::kShared);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)), static_cast<unsigned>(ceil_div(p.m, kCols)));
  wgmma_kernel<T, kBits, kCols><<<blocks, Tile::kThreads, Tile::kShared, stream>>>(x_map<T>(p, kCols), p);
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
