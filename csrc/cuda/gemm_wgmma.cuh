// y = x W^T + bias with wgmma (sm_90a), for many rows of x: the problem transposed, so that the decoded weight is the A
// operand in registers and x, which the tensor memory accelerator brings, is B. One producer thread fills a ring of
// stages; two warpgroups of 64 rows of the weight each decode the next tile while the tensor cores multiply the last.
#pragma once

#include "codecs.cuh"
#include "hopper.cuh"
#include "tile.h"

namespace lowbit::cuda {

// acc (64 x kCols) = A B, or += with `adds`: A of 16 columns in registers, B described by `b`.
#define LOWBIT_WGMMA(COLS, TYPE, REGISTERS, A0, A1, A2, A3, B, ADDS)                                            \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLS "k16.f32." TYPE \
  "." TYPE " {" REGISTERS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", adds, 1, 1, 0;\n}"
template <class T, int kCols>
__device__ __forceinline__ void multiply_async(float (&c)[kCols / 2], const uint32_t (&a)[4], uint64_t b, int adds) {
  constexpr bool kHalf = Half<T>::kType == Type::kF16;
#define LOWBIT_MULTIPLY_64(TYPE)                                                                       \
  asm volatile(LOWBIT_WGMMA("64", TYPE, LOWBIT_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", "%37") \
               : LOWBIT_8(0), LOWBIT_8(8), LOWBIT_8(16), LOWBIT_8(24)                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))
#define LOWBIT_MULTIPLY_128(TYPE)                                                                                \
  asm volatile(LOWBIT_WGMMA("128", TYPE, LOWBIT_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", "%69")          \
               : LOWBIT_8(0), LOWBIT_8(8), LOWBIT_8(16), LOWBIT_8(24), LOWBIT_8(32), LOWBIT_8(40), LOWBIT_8(48), \
                 LOWBIT_8(56)                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))
  if constexpr (kCols == 64 && kHalf) {
    LOWBIT_MULTIPLY_64("f16");
  } else if constexpr (kCols == 64) {
    LOWBIT_MULTIPLY_64("bf16");
  } else if constexpr (kHalf) {
    LOWBIT_MULTIPLY_128("f16");
  } else {
    LOWBIT_MULTIPLY_128("bf16");
  }
#undef LOWBIT_MULTIPLY_64
#undef LOWBIT_MULTIPLY_128
}

template <class T, int kBits, int kCols>
__global__ void __launch_bounds__(WgmmaTile<kBits, kCols>::kThreads, 1)
    wgmma_kernel(__grid_constant__ const CUtensorMap x_map, const Linear p) {
  using Tile = WgmmaTile<kBits, kCols>;
  extern __shared__ __align__(1024) uint8_t swizzled[];  // a name of its own: alignment belongs to the name
  uint8_t* const shared = swizzled;
  const int lane = threadIdx.x % kLanes, row_tile = threadIdx.x / kLanes;  // of the block; the producer has none
  const int64_t tiles_n = ceil_div(p.n, kTileN);
  const int tiles_k = static_cast<int>(ceil_div(p.k, kTileK));
  const int64_t tile_n0 = blockIdx.x * int64_t{Tile::kRowTiles}, m0 = blockIdx.y * int64_t{kCols};
  uint8_t* const ring = shared + table_bytes(kBits);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + Tile::kStages * Tile::kStageBytes);
  uint64_t* const empty = full + Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, Tile::kRowTiles);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  fill_table<T, kBits>(shared, p.table);
  __syncthreads();

  if (threadIdx.x >= Tile::kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != Tile::kConsumers) return;
    const int tiles = static_cast<int>(min(int64_t{Tile::kRowTiles}, tiles_n - tile_n0));
    for (int i = 0; i < tiles_k; ++i) {
      const int slot = i % Tile::kStages;
      uint8_t* const stage = ring + slot * Tile::kStageBytes;
      if (i >= Tile::kStages) barrier_wait(empty + slot, (i / Tile::kStages - 1) & 1);
      barrier_expect(full + slot, Tile::kXBytes + tiles * tile_bytes(kBits));
      copy_tile(stage, &x_map, i * kTileK, static_cast<int>(m0), full + slot);
      for (int t = 0; t < tiles; ++t)
        copy_bulk(stage + Tile::kXBytes + t * tile_bytes(kBits),
                  reinterpret_cast<const uint8_t*>(p.codes) + ((tile_n0 + t) * tiles_k + i) * tile_bytes(kBits),
                  tile_bytes(kBits), full + slot);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const uint8_t* const copy = shared + copy_offset(kBits, lane);
  const int64_t scale_row = min(tile_n0 + row_tile, tiles_n - 1) * p.num_groups * kTileN + lane / 4;
  const int group_tiles = p.group < p.k ? tiles_per_group(p.group) : tiles_k;
  float acc[kCols / 2], total[kCols / 2] = {};
  const auto decode_tile = [&](int i, uint32_t (&a)[kSteps][4]) {
    barrier_wait(full + i % Tile::kStages, i / Tile::kStages & 1);
    uint32_t words[kBits];
    load_words<kBits>(ring + i % Tile::kStages * Tile::kStageBytes + Tile::kXBytes + row_tile * tile_bytes(kBits), lane,
                      words);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) decode<kBits>(words, s, copy, a[s]);
    if (p.zero == Zero::kInt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = scale_row + i / group_tiles * kTileN + 8 * h;
        const T v = Half<T>::from(static_cast<const int8_t*>(p.zeros)[at]);
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
          a[s][h] = subtract<T>(a[s][h], pair_bits<T>(v, v)),
          a[s][2 + h] = subtract<T>(a[s][2 + h], pair_bits<T>(v, v));
      }
    }
  };
  bool fresh = true;
  float scale[2] = {1, 1};
  // Multiplies tile i, whose values are in `a`, and decodes the next one into `next` meanwhile.
  const auto step = [&](int i, uint32_t (&a)[kSteps][4], uint32_t (&next)[kSteps][4]) {
    const uint64_t b = tile_descriptor(address_of(ring + i % Tile::kStages * Tile::kStageBytes));
    multiply_begin(acc);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) multiply_async<T, kCols>(acc, a[s], b + 2 * s, s > 0 || !fresh);
    multiply_commit();
    const bool ends = i + 1 == tiles_k || (i + 1) % group_tiles == 0;
    if (ends && p.scales)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        scale[h] = load_float(p.scales, p.scale_type, scale_row + i / group_tiles * kTileN + 8 * h);
    if (i + 1 < tiles_k) decode_tile(i + 1, next);
    multiply_wait(acc);
    if (lane == 0) barrier_arrive(empty + i % Tile::kStages);
    fresh = ends;
    if (ends)
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j) total[j] += __fmul_rn(scale[j / 2 % 2], acc[j]);
  };
  uint32_t a[2][kSteps][4];
  decode_tile(0, a[0]);
  for (int i = 0; i < tiles_k; i += 2) {
    step(i, a[0], a[1]);
    if (i + 1 < tiles_k) step(i + 1, a[1], a[0]);
  }

  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < kCols / 2; ++j)
    sums[Tile::sum_col(lane, j) * Tile::kPitchSum + Tile::sum_row(row_tile, lane, j)] = total[j];
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  for (int i = threadIdx.x; i < kCols * Tile::kRows; i += Tile::kConsumers) {
    const int row = i % Tile::kRows, col = i / Tile::kRows;
    const int64_t n = tile_n0 * kTileN + row, m = m0 + col;
    if (n >= p.n || m >= p.m) continue;
    float v = sums[col * Tile::kPitchSum + row] + float_zero_term(p, n, m);
    if (p.bias) v += load_float(p.bias, p.bias_type, n);
    store_float(p.out, p.out_type, m * p.n + n, v);
  }
}

}  // namespace lowbit::cuda
