// y = x W^T + bias with mma.sync m16n8k16 (sm_80 and newer), for few rows of x: the weight is the A operand, whose
// lanes find their own bytes and decode them in registers, x is B. Codes, x and scales come through a ring of stages:
// from sm_90 on a thread of its own fills it with the tensor memory accelerator, one copy for each operand, before that
// all threads do with cp.async. Sums of a group are scaled once, in fp32. Where K is split over blocks, a second kernel
// adds the parts in order.
#pragma once

#include "codecs.cuh"
#include "hopper.cuh"
#include "tile.h"

namespace lowbit::cuda {

__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define LOWBIT_MMA(TYPE)                                                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                           \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                       \
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))
  if constexpr (Half<T>::kType == Type::kF16)
    LOWBIT_MMA("f16");
  else
    LOWBIT_MMA("bf16");
#undef LOWBIT_MMA
}

// The architecture that this is compiled for; 0 for the host.
#ifdef __CUDA_ARCH__
constexpr int kCode = __CUDA_ARCH__ / 10;
#else
constexpr int kCode = 0;
#endif

// What a block knows of its problem, in 32 bits where that is enough.
struct Block {
  int m0, tile_n0, tiles_n, tiles_k, rows, num_groups;
  int groups;            // that meet in a tile, 0 if there is one for all
  int stage_groups;      // that a stage has room for
  uint32_t group_tiles;  // reciprocal of the tiles that a group covers
  int scale_size, zero_size;
};

// The ring of stages [first, last) of a block. With the accelerator one thread calls `produce`; without, all threads
// call `load_next` for each stage.
template <class Tile>
struct Ring {
  const Linear& p;
  const Block& b;
  uint8_t* slots;
  const StageBytes bytes;
  uint64_t *full, *empty;
  const int depth, first, last;
  int stage, slot;

  __device__ void initialize() const {
#pragma unroll 1
    for (int i = 0; i < depth; ++i) barrier_init(full + i, 1), barrier_init(empty + i, Tile::kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void produce(const Maps& maps) const {
    const bool scales = b.groups && b.scale_size, zeros = b.groups && b.zero_size;
    const uint32_t expected = bytes.codes + bytes.x + bytes.scales + bytes.zeros;
    int index = 0, parity = 1;
#pragma unroll 1
    for (int i = first; i < last; ++i) {
      barrier_wait(empty + index, parity);
      uint8_t* const to = slots + index * bytes.total();
      const int group = first_group<Tile>(i, b.group_tiles, b.groups);
      barrier_expect(full + index, expected);
      copy_box(to, &maps.codes, 0, i * Tile::kStageTiles, b.tile_n0, full + index);
      copy_box(to + bytes.x_at(), &maps.x, 0, b.m0, i * Tile::kStageTiles, full + index);
      if (scales) copy_box(to + bytes.scales_at(), &maps.scales, 0, group, b.tile_n0, full + index);
      if (zeros) copy_box(to + bytes.zeros_at(), &maps.zeros, 0, group, b.tile_n0, full + index);
      if (++index == depth) index = 0, parity ^= 1;
    }
  }

  __device__ void load_next() {
    if (stage < last) {
      const uint32_t to = address_of(slots) + slot * bytes.total();
      const int thread = threadIdx.x;
      const auto load = [&](const void* from, uint32_t part, const Piece& piece) {
        if (piece.valid) copy_async(part + piece.to, static_cast<const uint8_t*>(from) + piece.from);
      };
#pragma unroll
      for (int i = 0; i < static_cast<int>(ceil_div(Tile::kCodeBytes / 16, Tile::kThreads)); ++i)
        load(p.codes, to, code_piece<Tile>(i * Tile::kThreads + thread, stage, b.tile_n0, b.tiles_n, b.tiles_k));
      const uint8_t* const x = static_cast<const uint8_t*>(p.x) + b.m0 * p.x_stride * 2;
      const int valid_rows = static_cast<int>(min(p.m - b.m0, int64_t{b.rows}));
#pragma unroll 1
      for (int i = thread; i < bytes.x / 16; i += Tile::kThreads)
        load(x, to + bytes.x_at(), x_piece<Tile>(i, stage, b.rows, valid_rows, b.tiles_k, p.x_stride));
      const int group = first_group<Tile>(stage, b.group_tiles, b.groups);
      const auto load_values = [&](const void* from, uint32_t part, int size) {
#pragma unroll 1
        for (int i = thread; i < Tile::kRowTilesOfBlock * b.stage_groups * size; i += Tile::kThreads)
          load(from, part, scale_piece<Tile>(i, group, b.stage_groups, b.tile_n0, b.tiles_n, b.num_groups, size));
      };
      if (b.scale_size) load_values(p.scales, to + bytes.scales_at(), b.scale_size);
      if (b.zero_size) load_values(p.zeros, to + bytes.zeros_at(), b.zero_size);
      ++stage;
      if (++slot == depth) slot = 0;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

// kFine: groups of 16 or 32, several in a tile.
template <class T, int kBits, int kTilesM, bool kFine>
__global__ void __launch_bounds__(MmaTile<kBits, kTilesM>::threads(MmaTile<kBits, kTilesM>::bulk(kCode)),
                                  MmaTile<kBits, kTilesM>::resident(kCode, kFine))
    mma_kernel(__grid_constant__ const Maps maps, const Linear p, const MmaRun run) {
  using Tile = MmaTile<kBits, kTilesM>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t m0 = blockIdx.z * int64_t{Tile::kCols};
  const int tiles_k = static_cast<int>(ceil_div(p.k, kTileK)), groups = run.groups;
  const Block block{static_cast<int>(m0),
                    static_cast<int>(blockIdx.x * Tile::kRowTilesOfBlock),
                    static_cast<int>(ceil_div(p.n, kTileN)),
                    tiles_k,
                    static_cast<int>(min(p.m, int64_t{Tile::kCols})),
                    static_cast<int>(p.num_groups),
                    groups,
                    run.stage_groups,
                    run.group_tiles,
                    p.scales ? type_bytes(p.scale_type) : 0,
                    p.zero == Zero::kInt ? 1 : 0};
  const int first = static_cast<int>(blockIdx.y) * run.stages_per_split;
  const int last = min(first + run.stages_per_split, static_cast<int>(ceil_div(tiles_k, Tile::kStageTiles)));
  const StageBytes bytes = stage_bytes<Tile>(block.rows, block.stage_groups, block.scale_size, block.zero_size);
  // The barriers stand last, so that 64 bytes beyond any stage can be read.
  uint8_t* const slots = shared + table_bytes(kBits);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(slots + ring_bytes<Tile>(run.depth, bytes));
  Ring<Tile> ring{p, block, slots, bytes, barriers, barriers + Tile::kMostStages, run.depth, first, last, first, 0};
  constexpr bool kBulk = Tile::bulk(kCode);
  if constexpr (kBulk) {
    if (threadIdx.x == 0) ring.initialize();
    __syncthreads();
    if (warp == Tile::kWarps) {
      if (lane == 0) ring.produce(maps);
      return;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < run.depth - 1; ++i) ring.load_next();
  }
  // All threads but the copying warp.
  const auto synchronize = [] { asm volatile("bar.sync 1, %0;" ::"n"(Tile::kThreads) : "memory"); };
  fill_table<T, kBits>(shared, p.table, threadIdx.x, Tile::kThreads);
  if constexpr (kBulk) synchronize();

  // Where a lane finds its own within a stage, or within the table.
  const uint8_t* const copy = shared + kept(copy_offset(kBits, lane));
  const int words_at = kept(Tile::slot(Tile::row_tile(warp, 0), Tile::k_tile(warp, 0)) * tile_bytes(kBits) +
                            word_at(kBits, lane, 0) * 4);
  const ScaleReader read_scale(p.scale_type, lane);
  const bool scaled = p.scales && groups, subtracts = p.zero == Zero::kInt;
  // Bytes from a group to the next one, and from a row tile to the next one; all groups are the first if there is one.
  const int scale_step = scaled ? kTileN * block.scale_size : 0, zero_step = groups ? kTileN * block.zero_size : 0;
  const int scale_pitch = block.stage_groups * scale_step, zero_pitch = block.stage_groups * zero_step;
  const int scales_at = kept(bytes.scales_at() + Tile::row_tile(warp, 0) * scale_pitch);
  // More have no registers, and from sm_100 on two tiles of x neither.
  constexpr bool kKeepsX = kTilesM * Tile::kTilesK <= 2 && !(kCode >= 100 && kTilesM == 2);
  uint32_t x_kept[kKeepsX ? kTilesM : 1][Tile::kTilesK];
  const auto x_start = [&](int t, int j) {
    return bytes.x_at() + Tile::x_start(lane, t, Tile::k_tile(warp, j), block.rows);
  };
  if constexpr (kKeepsX)
#pragma unroll
    for (int t = 0; t < kTilesM; ++t)
#pragma unroll
      for (int j = 0; j < Tile::kTilesK; ++j) x_kept[t][j] = kept(x_start(t, j));
  float total[Tile::kRowTiles][kTilesM][4] = {};
  uint32_t zero[Tile::kRowTiles][2] = {};
  // Scales of a lane's rows. Where none stand there, what does is not used.
  const auto load_scales = [&](const uint8_t* at, float (&scale)[Tile::kRowTiles][2]) {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
      const float first = read_scale(at + r * scale_pitch, 0), second = read_scale(at + r * scale_pitch, 1);
      scale[r][0] = scaled ? first : 1.0f, scale[r][1] = scaled ? second : 1.0f;
    }
  };
  const auto whole_row = [&](int r) {
    return min(block.tile_n0 + Tile::row_tile(warp, r), block.tiles_n - 1) * kTileN;
  };
  if (subtracts && groups == 0)
    for (int r = 0; r < Tile::kRowTiles; ++r) load_zeros<T>(p.zeros, whole_row(r) + lane / 4, zero[r]);
  const uint32_t ends = kFine ? group_ends(p.group, p.k) : 1u << (kSteps - 1);  // of groups, or of the tile

  // Products of a tile of the stage at `slot`, with integer zeros if `kSubtracts`; `more` groups follow the first one's
  // scales, of which the last stands for those that K does not reach.
  const auto multiply_tile = [&]<bool kSubtracts>(const uint8_t* slot, int j, const uint8_t* scales,
                                                  const uint8_t* zeros, int more) {
    const uint32_t slot_x = address_of(slot);
    // Where a warp has few sums, those of odd steps stand apart: products that follow each other wait less.
    constexpr int kChains = kTilesM == 1 && !kFine ? 2 : 1;
    float acc[kChains][Tile::kRowTiles][kTilesM][4] = {}, scale[Tile::kRowTiles][2];
    uint32_t words[Tile::kRowTiles][kBits];
    constexpr bool kLate = kTilesM == 8;  // no registers for scales that wait
    if (!kLate) load_scales(scales, scale);
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
      load_words<kBits>(slot + words_at + Tile::slot(r, j) * tile_bytes(kBits), 0, words[r]);
      if (kSubtracts && groups) load_zeros<T>(zeros + r * zero_pitch, lane / 4, zero[r]);
    }
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      uint32_t b[kTilesM][4];
#pragma unroll
      for (int t = 0; t < kTilesM; ++t)
        load_matrices(slot_x + ((kKeepsX ? x_kept[kKeepsX ? t : 0][j] : x_start(t, j)) ^ s * kStepK * 2), b[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < Tile::kRowTiles; ++r) {
          uint32_t a[4];
          decode<kBits>(words[r], s + half, copy, a);
          if (kSubtracts)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = subtract<T>(a[i], zero[r][i % 2]);
#pragma unroll
          for (int t = 0; t < kTilesM; ++t)
            multiply<T>(acc[half % kChains][r][t], a, b[t][2 * half], b[t][2 * half + 1]);
        }
        if (kFine ? ends >> (s + half) & 1 : s + half + 1 == kSteps) {
          if (kLate) load_scales(scales, scale);
#pragma unroll
          for (int r = 0; r < Tile::kRowTiles; ++r)
#pragma unroll
            for (int t = 0; t < kTilesM; ++t)
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                const float sum = kChains == 2 ? acc[0][r][t][c] + acc[kChains - 1][r][t][c] : acc[0][r][t][c];
                total[r][t][c] = fmaf(scale[r][c / 2], sum, total[r][t][c]);
                acc[0][r][t][c] = 0;
              }
          if (s + half + 1 == kSteps) continue;
          if (more-- > 0) scales += scale_step, zeros += zero_step;
          if (!kLate) load_scales(scales, scale);
          if (kSubtracts)
            for (int r = 0; r < Tile::kRowTiles; ++r) load_zeros<T>(zeros + r * zero_pitch, lane / 4, zero[r]);
        }
      }
    }
  };

  int slot_index = 0, parity = 0;
  for (int stage = first; stage < last; ++stage) {
    if constexpr (kBulk) {
      barrier_wait(ring.full + slot_index, parity);
    } else {
      if (run.depth == 4)
        asm volatile("cp.async.wait_group 2;" ::: "memory");
      else if (run.depth == 3)
        asm volatile("cp.async.wait_group 1;" ::: "memory");
      else
        asm volatile("cp.async.wait_group 0;" ::: "memory");
      synchronize();
      ring.load_next();
    }
    const uint8_t* const slot = slots + slot_index * bytes.total();
    const int group0 = first_group<Tile>(stage, run.group_tiles, kFine ? groups : 1);
    const int last_group = block.num_groups - 1 - group0;  // of those from the first on
#pragma unroll
    for (int j = 0; j < Tile::kTilesK; ++j) {
      const int in_stage = Tile::k_tile(warp, j), tile_k = stage * Tile::kStageTiles + in_stage;
      if (tile_k >= tiles_k) break;
      const int group = min(kFine ? in_stage * groups : group_of(tile_k, run.group_tiles) - group0, last_group);
      const uint8_t* const scales = slot + scales_at + group * scale_step;
      const uint8_t* const zeros = slot + bytes.zeros_at() + Tile::row_tile(warp, 0) * zero_pitch + group * zero_step;
      if (subtracts)
        multiply_tile.template operator()<true>(slot, j, scales, zeros, last_group - group);
      else
        multiply_tile.template operator()<false>(slot, j, scales, zeros, last_group - group);
    }
    if constexpr (kBulk) {
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty + slot_index);
    }
    if (++slot_index == run.depth) slot_index = 0, parity ^= 1;
  }
  if (groups == 0 && p.scales)
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float scale = load_float(p.scales, p.scale_type, whole_row(r) + lane / 4 + c / 2 * 8);
#pragma unroll
        for (int t = 0; t < kTilesM; ++t) total[r][t][c] *= scale;
      }

  // The warps that share rows add up, in order.
  synchronize();
  float* const sums = reinterpret_cast<float*>(slots);
#pragma unroll
  for (int r = 0; r < Tile::kRowTiles; ++r)
#pragma unroll
    for (int t = 0; t < kTilesM; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sums[(Tile::warp_k(warp) * Tile::kCols + Tile::sum_col(lane, t, c)) * Tile::kPitchSum +
             Tile::sum_row(warp, lane, r, c)] = total[r][t][c];
  synchronize();
  for (int i = threadIdx.x; i < block.rows * Tile::kRows; i += Tile::kThreads) {
    const int row = i % Tile::kRows, col = i / Tile::kRows;
    const int64_t n = int64_t{block.tile_n0} * kTileN + row, m = m0 + col;
    if (n >= p.n || m >= p.m) continue;
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
