// y = x W^T + bias with mma.sync m16n8k16 (sm_80 and newer), for few rows of x: the weight is the A operand, whose
// lanes find their own bytes and decode them in registers, x is B. Codes, x and scales come through a ring of stages
// that cp.async fills; sums of a group are scaled once, in fp32. Where K is split over blocks, a second kernel adds the
// parts in order.
#pragma once

#include "codecs.cuh"
#include "tile.h"

namespace lowbit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes, of which the first `valid` are read and the others are zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Weights pass through the L2 cache once and leave it to x.
__device__ __forceinline__ void copy_async_once(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (Half<T>::kType == Type::kF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What a block knows of its problem, in 32 bits where that is enough.
struct Block {
  int tile_n0, tiles_n, tiles_k, k, rows, groups, group_tiles, num_groups, scale_size, zero_size;
};

// Copies what stage `stage` of a block reads to `slot`; x begins at the block's first row.
template <class Tile>
__device__ __forceinline__ void load_stage(const Linear& p, const Block& b, const uint8_t* x, uint8_t* slot,
                                           const StageBytes& bytes, int stage, uint64_t policy) {
  constexpr int kPieces = Tile::kCodeBytes / 16, kTiles = Tile::kWarpsN * Tile::kRowTiles * Tile::kStageTiles;
#pragma unroll
  for (int i = 0; i < static_cast<int>(ceil_div(kPieces, Tile::kThreads)); ++i) {
    const Copy c = copy_codes<Tile>(i * Tile::kThreads + threadIdx.x, stage, b.tile_n0, b.tiles_n, b.tiles_k);
    if (c.valid > 0) copy_async_once(slot + c.to, reinterpret_cast<const uint8_t*>(p.codes) + c.from, policy);
  }
  slot += bytes.codes;
#pragma unroll 1
  for (int piece = threadIdx.x; piece < b.rows * (Tile::kStageK / 8); piece += Tile::kThreads) {
    const Copy c = copy_x<Tile>(piece, stage, b.k, p.x_stride);
    copy_async(slot + c.to, x + c.from, c.valid);
  }
  slot += bytes.x;
  const auto load = [&](const void* values, int size, uint8_t* to) {
#pragma unroll 1
    for (int piece = threadIdx.x; piece < kTiles * b.groups * size; piece += Tile::kThreads) {
      const Copy c =
          copy_scales<Tile>(piece, stage, b.tile_n0, b.tiles_n, b.tiles_k, b.group_tiles, b.num_groups, b.groups, size);
      if (c.valid > 0) copy_async(to + c.to, static_cast<const uint8_t*>(values) + c.from);
    }
  };
  if (b.scale_size) load(p.scales, b.scale_size, slot);
  if (b.zero_size) load(p.zeros, b.zero_size, slot + bytes.scales);
}

// An integer zero of rows `row` and `row` + 8, twice each.
template <class T>
__device__ __forceinline__ void load_zeros(const void* zeros, int64_t row, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T v = Half<T>::from(static_cast<const int8_t*>(zeros)[row + 8 * h]);
    pairs[h] = pair_bits<T>(v, v);
  }
}

template <class T, int kBits, int kTilesM>
__global__ void __launch_bounds__(MmaTile<kBits, kTilesM>::kThreads, MmaTile<kBits, kTilesM>::kBlocksPerSm)
    mma_kernel(const Linear p, const int64_t stages_per_split) {
  using Tile = MmaTile<kBits, kTilesM>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t m0 = blockIdx.z * int64_t{Tile::kCols};
  const int tiles_k = static_cast<int>(ceil_div(p.k, kTileK)), groups = groups_per_tile(p.group, p.k);
  const Block block{static_cast<int>(blockIdx.x * (Tile::kRows / kTileN)),
                    static_cast<int>(ceil_div(p.n, kTileN)),
                    tiles_k,
                    static_cast<int>(p.k),
                    static_cast<int>(min(p.m - m0, int64_t{Tile::kCols})),
                    groups,
                    tiles_per_group(p.group),
                    static_cast<int>(p.num_groups),
                    p.scales ? type_bytes(p.scale_type) : 0,
                    p.zero == Zero::kInt ? 1 : 0};
  const int first = static_cast<int>(blockIdx.y * stages_per_split);
  const int last =
      min(first + static_cast<int>(stages_per_split), static_cast<int>(ceil_div(tiles_k, Tile::kStageTiles)));
  const uint32_t ends = group_ends(p.group, p.k);
  const int scale_bytes = groups * kTileN * block.scale_size, zero_bytes = groups * kTileN * block.zero_size;
  const StageBytes bytes = stage_bytes<Tile>(block.rows, scale_bytes, zero_bytes);
  uint8_t* const ring = shared + table_bytes(kBits);
  const uint8_t* const copy = shared + copy_offset(kBits, lane);
  const uint8_t* const x = static_cast<const uint8_t*>(p.x) + m0 * p.x_stride * 2;
  const uint64_t policy = evict_first();
  const auto slot_of = [&](int stage) {
    return ring + static_cast<unsigned>(stage - first) % Tile::kStages * bytes.total();
  };
  const auto load = [&](int stage) {
    if (stage < last) load_stage<Tile>(p, block, x, slot_of(stage), bytes, stage, policy);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) load(first + i);
  fill_table<T, kBits>(shared, p.table);

  float acc[Tile::kRowTiles][kTilesM][4] = {}, total[Tile::kRowTiles][kTilesM][4] = {};
  uint32_t zero[Tile::kRowTiles][2] = {};
  // Adds the sums of a group, multiplied by the scales that stand at `scales` for each row tile.
  const auto flush = [&](const void* const(&scales)[Tile::kRowTiles]) {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = p.scales ? load_scale(scales[r], p.scale_type, lane / 4 + 8 * h) : 1.0f;
#pragma unroll
        for (int t = 0; t < kTilesM; ++t) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            total[r][t][2 * h + e] += __fmul_rn(scale, acc[r][t][2 * h + e]);
            acc[r][t][2 * h + e] = 0;
          }
        }
      }
    }
  };
  if (p.zero == Zero::kInt && groups == 0)
    for (int r = 0; r < Tile::kRowTiles; ++r)
      load_zeros<T>(p.zeros, min(block.tile_n0 + Tile::row_tile(warp, r), block.tiles_n - 1) * kTileN + lane / 4,
                    zero[r]);

  for (int stage = first; stage < last; ++stage) {
    asm volatile("cp.async.wait_group %0;" ::"n"(Tile::kStages - 2) : "memory");
    __syncthreads();
    load(stage + Tile::kStages - 1);
    const uint8_t* const slot = slot_of(stage);
    const uint32_t slot_x = shared_address(slot + bytes.codes);
#pragma unroll
    for (int j = 0; j < Tile::kTilesK; ++j) {
      const int in_stage = Tile::k_tile(warp, j);
      const int tile_k = stage * Tile::kStageTiles + in_stage;
      if (tile_k >= tiles_k) break;
      uint32_t words[Tile::kRowTiles][kBits];
      const uint8_t *scales[Tile::kRowTiles], *zeros[Tile::kRowTiles];
#pragma unroll
      for (int r = 0; r < Tile::kRowTiles; ++r) {
        const int tile = Tile::slot(Tile::row_tile(warp, r), in_stage);
        load_words<kBits>(slot + tile * tile_bytes(kBits), lane, words[r]);
        scales[r] = slot + bytes.codes + bytes.x + tile * scale_bytes;
        zeros[r] = slot + bytes.codes + bytes.x + bytes.scales + tile * zero_bytes;
        if (p.zero == Zero::kInt && groups) load_zeros<T>(zeros[r], lane / 4, zero[r]);
      }
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t b[kTilesM][4];
#pragma unroll
        for (int t = 0; t < kTilesM; ++t)
          load_matrices(slot_x + Tile::x_address(lane, t, in_stage, s, block.rows), b[t]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < Tile::kRowTiles; ++r) {
            uint32_t a[4];
            decode<kBits>(words[r], s + half, copy, a);
            if (p.zero == Zero::kInt)
#pragma unroll
              for (int i = 0; i < 4; ++i) a[i] = subtract<T>(a[i], zero[r][i % 2]);
#pragma unroll
            for (int t = 0; t < kTilesM; ++t) multiply<T>(acc[r][t], a, b[t][2 * half], b[t][2 * half + 1]);
          }
          if (ends >> (s + half) & 1) {
            flush({scales[0], scales[1]});
            if (s + half + 1 == kSteps) continue;
#pragma unroll
            for (int r = 0; r < Tile::kRowTiles; ++r) {
              scales[r] += kTileN * type_bytes(p.scale_type);
              zeros[r] += kTileN * type_bytes(p.zero_type);
              if (p.zero == Zero::kInt) load_zeros<T>(zeros[r], lane / 4, zero[r]);
            }
          }
        }
      }
    }
  }
  if (groups == 0) {
    const void* scales[Tile::kRowTiles];
    for (int r = 0; r < Tile::kRowTiles; ++r)
      scales[r] = static_cast<const uint8_t*>(p.scales) +
                  min(block.tile_n0 + Tile::row_tile(warp, r), block.tiles_n - 1) * kTileN * type_bytes(p.scale_type);
    flush({scales[0], scales[1]});
  }

  // The warps that share rows add up, in order.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int r = 0; r < Tile::kRowTiles; ++r)
#pragma unroll
    for (int t = 0; t < kTilesM; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(Tile::warp_k(warp) * Tile::kCols + Tile::sum_col(lane, t, c)) * Tile::kPitchSum +
             Tile::sum_row(warp, lane, r, c)] = total[r][t][c];
  __syncthreads();
  for (int i = threadIdx.x; i < block.rows * Tile::kRows; i += Tile::kThreads) {
    const int row = i % Tile::kRows, col = i / Tile::kRows;
    const int64_t n = int64_t{block.tile_n0} * kTileN + row, m = m0 + col;
    if (n >= p.n) continue;
    float v = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsK; ++w) v += sums[(w * Tile::kCols + col) * Tile::kPitchSum + row];
    if (blockIdx.y == 0) v += float_zero_term(p, n, m);
    if (p.parts) {
      p.parts[(blockIdx.y * p.m + m) * p.n + n] = v;
    } else {
      if (p.bias) v += load_float(p.bias, p.bias_type, n);
      store_float(p.out, p.out_type, m * p.n + n, v);
    }
  }
}

}  // namespace lowbit::cuda
