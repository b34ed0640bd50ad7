// The weight as floats in memory: all of it, a tile for each warp at a time, or some of its rows.
#pragma once

#include "codecs.cuh"
#include "tile.h"

namespace lowbit::cuda {

// scale * (T - subtract) + add, each rounded in fp32. What a format lacks is what changes no number: +0 taken away, 1,
// and -0 added.
struct Affine {
  float subtract, scale, add;
  __device__ __forceinline__ float operator()(float v) const {
    return __fadd_rn(__fmul_rn(scale, __fsub_rn(v, subtract)), add);
  }
};
__device__ __forceinline__ Affine affine_of(const Dequantize& p, float scale, float zero) {
  return {p.zero == Zero::kInt || p.zero == Zero::kSubtract ? zero : 0.0f, p.scales ? scale : 1.0f,
          p.zero == Zero::kAdd ? zero : -0.0f};
}

// load_float in two halves: a load can be on its way for long before its number is needed.
__device__ __forceinline__ uint32_t load_bits(const void* p, Type type, int64_t i) {
  if (type == Type::kF32) return __ldg(static_cast<const uint32_t*>(p) + i);
  if (type == Type::kI8) return __ldg(static_cast<const uint8_t*>(p) + i);
  return __ldg(static_cast<const uint16_t*>(p) + i);
}
// Without branches: each would double what follows.
__device__ __forceinline__ float float_of(uint32_t bits, Type type) {
  const float f16 = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  const float i8 = static_cast<int8_t>(bits);
  const float wide = __uint_as_float(type == Type::kBf16 ? bits << 16 : bits);
  return type == Type::kF16 ? f16 : type == Type::kI8 ? i8 : wide;
}

__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ void store_pair(__half* to, float low, float high) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(low, high);
}

// What a lane loads of a tile: its codes, and one or two (of four groups) of the tile's scales and zeros.
template <int kBits>
struct TileLoad {
  uint32_t words[kBits], scales[2] = {}, zeros[2] = {};

  __device__ __forceinline__ void load(const Dequantize& p, const DequantizePlan& plan, uint32_t tile_n,
                                       uint32_t tile_k, int lane) {
    const int64_t tile = int64_t{tile_n} * plan.tiles_k + tile_k;
    load_words<kBits>(reinterpret_cast<const uint8_t*>(p.codes) + tile * tile_bytes(kBits), lane, words);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (e > 0 && plan.groups < 4) break;
      const int64_t at = tile_scale(e * kLanes + lane, tile_n, tile_k, plan);
      if (p.scales) scales[e] = load_bits(p.scales, p.scale_type, at);
      if (p.zero != Zero::kNone) zeros[e] = load_bits(p.zeros, p.zero_type, at);
    }
  }
  __device__ __forceinline__ void share_scales(const Dequantize& p, const DequantizePlan& plan, int lane,
                                               float4* shared) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (e > 0 && plan.groups < 4) break;
      const Affine a = affine_of(p, float_of(scales[e], p.scale_type), float_of(zeros[e], p.zero_type));
      shared[e * kLanes + lane] = make_float4(a.subtract, a.scale, a.add, 0);
    }
  }
};

// A warp stores its tile, as much as there is of `rows` and `row_bytes`, in accesses of Piece.
template <class Piece, class Tile>
__device__ __forceinline__ void store_tile(const uint8_t* tile, uint8_t* out, int64_t stride, int rows, int row_bytes,
                                           int lane) {
  constexpr int kWidth = sizeof(Piece), kRows = Tile::rows_at_once(kWidth);
  const int first = Tile::store_row(lane, kWidth);
  for (int byte = Tile::store_byte(lane, kWidth); byte < row_bytes; byte += kLanes * kWidth) {
    const uint8_t* from = tile + first * Tile::kPitch + byte;
    uint8_t* to = out + first * stride + byte;
#pragma unroll(kWidth == 16 ? kTileN : 1)
    for (int row = 0; row < kTileN; row += kRows, from += kRows * Tile::kPitch, to += kRows * stride)
      if (first + row < rows) *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
    if constexpr (Tile::row_stores(kWidth) <= kLanes) break;
  }
}

// The whole weight. Up to 5 bits, no two entries of the table share a bank.
template <int kBits, class T, class Tile = DequantizeTile<sizeof(T)>>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    dequantize_kernel(const Dequantize p, const DequantizePlan plan) {
  __shared__ float table[1 << kBits];
  __shared__ float4 shared_scales[Tile::kWarps][Tile::kMaxScales];
  __shared__ __align__(16) uint8_t shared_tiles[Tile::kWarps][Tile::kBytes];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t tile_n = Tile::tile_n(blockIdx.x, plan);
  const int64_t row = int64_t{tile_n} * kTileN, stride = p.k * Tile::kSize;
  const int rows = static_cast<int>(min(p.rows - row, int64_t{kTileN}));
  float4* const scales = shared_scales[warp];
  uint8_t* const tile = shared_tiles[warp];

  uint32_t tile_k = Tile::tile_k(blockIdx.x, warp, plan);
  TileLoad<kBits> in;
  if (tile_k < plan.tiles_k) in.load(p, plan, tile_n, tile_k, lane);
#pragma unroll 1
  for (int i = threadIdx.x; i < 1 << kBits; i += Tile::kThreads) table[i] = __ldg(p.table + i);
  __syncthreads();
#pragma unroll 1
  for (int j = 0; j < Tile::kTiles && tile_k < plan.tiles_k; ++j) {
    in.share_scales(p, plan, lane, scales);
    __syncwarp();  // also: the tile before is read
    Affine affine[2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (starts_group(s, plan.groups)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 a = scales[step_scale(s, plan.groups) + lane / 4 + 8 * half];
          affine[half] = {a.x, a.y, a.z};
        }
      }
      float v[8];  // all of them before the first store, which might be to the table for all the compiler knows
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t offset = shifted_field<kBits, 2>(in.words, 8 * s + i);
        v[i] = affine[i / 2 % 2](*reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(table) + offset));
      }
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        store_pair(reinterpret_cast<T*>(tile + Tile::code_byte(lane, 8 * s + i)), v[i], v[i + 1]);
    }
    // The next tile is on its way while this one is stored.
    const int64_t k = int64_t{tile_k} * kTileK;
    tile_k += Tile::kWarps;
    if (j + 1 < Tile::kTiles && tile_k < plan.tiles_k) in.load(p, plan, tile_n, tile_k, lane);
    __syncwarp();
    uint8_t* const out = static_cast<uint8_t*>(p.out) + row * stride + k * Tile::kSize;
    const int row_bytes = static_cast<int>(min(p.k - k, int64_t{kTileK})) * Tile::kSize;
    if (plan.width == 16)
      store_tile<uint4, Tile>(tile, out, stride, rows, row_bytes, lane);
    else if (plan.width == 4)
      store_tile<uint32_t, Tile>(tile, out, stride, rows, row_bytes, lane);
    else if constexpr (Tile::kSize == 2)
      store_tile<uint16_t, Tile>(tile, out, stride, rows, row_bytes, lane);
  }
}

// The rows that p.indices names: one for each blockIdx.x, two weights a thread. Every bit width at run time.
constexpr int kGatherThreads = 128;

template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const Dequantize p) {
  const int64_t row = p.indices[blockIdx.x], tiles_k = ceil_div(p.k, kTileK), pairs = ceil_div(p.k, 2);
  for (int64_t i = blockIdx.y * int64_t{kGatherThreads} + threadIdx.x; i < pairs; i += gridDim.y * kGatherThreads) {
    const uint32_t group = static_cast<uint32_t>(2 * i) / static_cast<uint32_t>(p.group);  // even, or one for the row
    const int64_t at = scale_at(row / kTileN, group, p.num_groups) + row % kTileN;
    const Affine affine = affine_of(p, p.scales ? load_float(p.scales, p.scale_type, at) : 1.0f,
                                    p.zero == Zero::kNone ? 0.0f : load_float(p.zeros, p.zero_type, at));
    for (int64_t k = 2 * i; k < min(2 * i + 2, p.k); ++k) {
      const float v = affine(__ldg(p.table + code_at(p.codes, p.bits, row, k, tiles_k)));
      T* const to = static_cast<T*>(p.out) + blockIdx.x * p.k + k;
      if constexpr (sizeof(T) == sizeof(float))
        *to = v;
      else
        *to = Half<T>::from(v);
    }
  }
}

}  // namespace lowbit::cuda
