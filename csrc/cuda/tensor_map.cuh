// Descriptions of matrices for the tensor memory accelerator.
#pragma once

#include <cuda.h>

#include "launch.cuh"
#include "memo.h"

namespace lowbit::cuda {

inline auto encode_tiled() {
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode_tiled_address());
  if (!encode) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  return encode;
}

// All that a description is made from.
struct MapKey {
  uint64_t data;
  int64_t sizes[3], strides[2];
  int32_t box[3], type, rank, swizzled;
};

// An array of `kRank` dimensions, the first without gaps, in boxes; zero beyond its edges. `strides`: bytes between
// elements of the others.
template <int kRank>
CUtensorMap encode_tensor_map(CUtensorMapDataType type, const void* data, const int64_t (&sizes)[kRank],
                              const int64_t (&strides)[kRank - 1], const int (&box)[kRank], bool swizzled) {
  CUtensorMap map;
  cuuint64_t size[kRank], stride[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i)
    size[i] = static_cast<cuuint64_t>(sizes[i]), boxes[i] = static_cast<cuuint32_t>(box[i]), steps[i] = 1;
  for (int i = 0; i + 1 < kRank; ++i) stride[i] = static_cast<cuuint64_t>(strides[i]);
  const CUresult result =
      encode_tiled()(&map, type, kRank, const_cast<void*>(data), size, stride, boxes, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

// `encode_tensor_map`, which takes the driver some time, once for each tensor.
template <int kRank>
CUtensorMap tensor_map(CUtensorMapDataType type, const void* data, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank], bool swizzled) {
  static_assert(kRank <= 3);
  MapKey key{reinterpret_cast<uintptr_t>(data), {}, {}, {}, static_cast<int32_t>(type), kRank, swizzled};
  for (int i = 0; i < kRank; ++i) key.sizes[i] = sizes[i], key.box[i] = box[i];
  for (int i = 0; i + 1 < kRank; ++i) key.strides[i] = strides[i];
  thread_local Memo<MapKey, CUtensorMap> known;
  return known.find(key, [&] { return encode_tensor_map<kRank>(type, data, sizes, strides, box, swizzled); });
}

// The codes of a weight in boxes of `row_tiles` by `k_tiles`, and scales or zeros in boxes of `row_tiles` by `groups`.
inline CUtensorMap codes_map(const Linear& p, int row_tiles, int k_tiles) {
  const int64_t tiles_k = ceil_div(p.k, kTileK);
  return tensor_map<3>(
      CU_TENSOR_MAP_DATA_TYPE_UINT32, p.codes, {tile_bytes(p.bits) / 4, tiles_k, ceil_div(p.n, kTileN)},
      {tile_bytes(p.bits), tiles_k * tile_bytes(p.bits)}, {tile_bytes(p.bits) / 4, k_tiles, row_tiles}, false);
}
inline CUtensorMap values_map(const Linear& p, const void* values, Type type, int row_tiles, int groups) {
  const int size = type_bytes(type);
  return tensor_map<3>(size == 4   ? CU_TENSOR_MAP_DATA_TYPE_UINT32
                       : size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8,
                       values, {kTileN, p.num_groups, ceil_div(p.n, kTileN)},
                       {kTileN * size, p.num_groups * kTileN * size}, {kTileN, groups, row_tiles}, false);
}

}  // namespace lowbit::cuda
