// y = x W^T + bias with wgmma (sm_90a), for many rows of x: the problem transposed, so that the decoded weight is the A
// operand in registers and x is B. One thread fills a ring of stages with the tensor memory accelerator; two
// warpgroups of 64 rows of the weight each decode the next tile while the tensor cores multiply the last, and scale the
// sums of 64 columns while they multiply the next 64. Where K is split over blocks, a second kernel adds the parts.
#pragma once

#include "codecs.cuh"
#include "hopper.cuh"
#include "tile.h"

namespace lowbit::cuda {

// acc (64 x 64) = A B, or += with `adds`: A of 16 columns in registers, B described by `b`.
#define LOWBIT_WGMMA(TYPE)                                                                                        \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE \
               "." TYPE " {" LOWBIT_REGISTERS_32 "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n}"                \
               : LOWBIT_8(0), LOWBIT_8(8), LOWBIT_8(16), LOWBIT_8(24)                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))
template <class T>
__device__ __forceinline__ void multiply_async(float (&c)[32], const uint32_t (&a)[4], uint64_t b, int adds) {
  if constexpr (Half<T>::kType == Type::kF16)
    LOWBIT_WGMMA("f16");
  else
    LOWBIT_WGMMA("bf16");
}
#undef LOWBIT_WGMMA

template <class T, int kBits, int kCols>
__global__ void __launch_bounds__(WgmmaTile<kBits, kCols>::kThreads, 1)
    wgmma_kernel(__grid_constant__ const Maps maps, const Linear p, const MmaRun run) {
  using Tile = WgmmaTile<kBits, kCols>;
  constexpr int kParts = kCols / 64;                     // columns of one product
  extern __shared__ __align__(1024) uint8_t swizzled[];  // a name of its own: alignment belongs to the name
  uint8_t* const shared = swizzled;
  const int lane = threadIdx.x % kLanes, row_tile = threadIdx.x / kLanes;  // of the block; the producer has none
  const int tiles_n = static_cast<int>(ceil_div(p.n, kTileN)), tiles_k = static_cast<int>(ceil_div(p.k, kTileK));
  const int tile_n0 = static_cast<int>(blockIdx.x) * Tile::kRowTiles;
  const int64_t m0 = blockIdx.y * int64_t{kCols};
  const int first = static_cast<int>(blockIdx.z) * run.stages_per_split;
  const int count = min(run.stages_per_split, tiles_k - first);
  const bool staged = p.group < p.k, scaled = staged && p.scales, subtracts = p.zero == Zero::kInt;
  uint8_t* const ring = shared + table_bytes(kBits);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + Tile::kStages * Tile::kStageBytes);
  uint64_t* const empty = full + Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, Tile::kRowTiles);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (threadIdx.x >= Tile::kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != Tile::kConsumers) return;
    const bool zeros = staged && subtracts;
    const int bytes = Tile::kXBytes + Tile::kRowTiles * (tile_bytes(kBits) +
                                                         kTileN * ((scaled ? type_bytes(p.scale_type) : 0) + zeros));
    int slot = 0, parity = 1;
    for (int i = first; i < first + count; ++i) {
      uint8_t* const stage = ring + slot * Tile::kStageBytes;
      const int group = group_of(i, run.group_tiles);
      barrier_wait(empty + slot, parity);
      barrier_expect(full + slot, bytes);
      copy_tile(stage, &maps.x, i * kTileK, static_cast<int>(m0), full + slot);
      copy_box(stage + Tile::kXBytes, &maps.codes, 0, i, tile_n0, full + slot);
      if (scaled) copy_box(stage + Tile::kScalesAt, &maps.scales, 0, group, tile_n0, full + slot);
      if (zeros) copy_box(stage + Tile::kZerosAt, &maps.zeros, 0, group, tile_n0, full + slot);
      if (++slot == Tile::kStages) slot = 0, parity ^= 1;
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  fill_table<T, kBits>(shared, p.table, threadIdx.x, Tile::kConsumers);
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  const uint8_t* const copy = shared + kept(copy_offset(kBits, lane));
  const int words_at = kept(Tile::codes_at(row_tile) + word_at(kBits, lane, 0) * 4);
  const int scales_at = kept(Tile::kScalesAt + row_tile * kTileN * type_bytes(p.scale_type));
  const ScaleReader read_scale(p.scale_type, lane);
  const int64_t whole_row = int64_t{min(tile_n0 + row_tile, tiles_n - 1)} * kTileN + lane / 4;
  const int group_tiles = staged ? tiles_per_group(p.group) : tiles_k;
  int left = group_tiles - first % group_tiles;  // tiles of this group
  uint32_t zero[2] = {};
  if (subtracts && !staged) load_zeros<T>(p.zeros, whole_row, zero);
  float acc[kParts][32], total[kParts][32] = {};

  // The values of a tile, and its scales.
  int decoded_slot = 0, decoded_parity = 0;
  const auto decode_tile = [&](uint32_t (&a)[kSteps][4], float (&scale)[2]) {
    const uint8_t* const stage = ring + decoded_slot * Tile::kStageBytes;
    barrier_wait(full + decoded_slot, decoded_parity);
    uint32_t words[kBits];
    load_words<kBits>(stage + words_at, 0, words);
    const float first_scale = read_scale(stage + scales_at, 0), second_scale = read_scale(stage + scales_at, 1);
    scale[0] = scaled ? first_scale : 1.0f, scale[1] = scaled ? second_scale : 1.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) decode<kBits>(words, s, copy, a[s]);
    if (subtracts) {
      if (staged) load_zeros<T>(stage + Tile::kZerosAt + row_tile * kTileN, lane / 4, zero);
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[s][r] = subtract<T>(a[s][r], zero[r % 2]);
    }
    if (++decoded_slot == Tile::kStages) decoded_slot = 0, decoded_parity ^= 1;
  };
  // Begins the products of a tile with a part of the columns; its sums begin anew if `fresh`.
  int slot = 0;
  const auto begin = [&](int part, int of_slot, const uint32_t (&a)[kSteps][4], bool fresh) {
    const uint64_t b = tile_descriptor(address_of(ring + of_slot * Tile::kStageBytes)) + part * (64 * 128 >> 4);
    multiply_begin(acc[part]);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) multiply_async<T>(acc[part], a[s], b + 2 * s, s > 0 || !fresh);
    multiply_commit();
  };
  // A tile is on its way; decodes and begins the next one, if there is `kMore`, and ends this one.
  const auto step = [&]<bool kMore>(const float (&scale)[2], uint32_t (&next)[kSteps][4], float (&next_scale)[2]) {
    const int next_slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    const bool ends = --left == 0 || !kMore;
    if constexpr (kMore) decode_tile(next, next_scale);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // Of those on their way, the one that is waited for is the oldest.
      if (kParts == 2 && (part == 0 || kMore))
        multiply_wait<1>(acc[part]);
      else
        multiply_wait<0>(acc[part]);
      if (part + 1 == kParts && lane == 0) barrier_arrive(empty + slot);
      if (ends)
#pragma unroll
        for (int j = 0; j < 32; ++j) total[part][j] = fmaf(scale[j / 2 % 2], acc[part][j], total[part][j]);
      if constexpr (kMore) begin(part, next_slot, next, ends);
    }
    if (left == 0) left = group_tiles;
    slot = next_slot;
  };
  uint32_t a[2][kSteps][4];
  float scale[2][2];
  decode_tile(a[0], scale[0]);
#pragma unroll
  for (int part = 0; part < kParts; ++part) begin(part, 0, a[0], true);
#pragma unroll 1
  for (int i = 0; i < (count - 1) / 2; ++i) {
    step.template operator()<true>(scale[0], a[1], scale[1]);
    step.template operator()<true>(scale[1], a[0], scale[0]);
  }
  if (count % 2 == 0) {
    step.template operator()<true>(scale[0], a[1], scale[1]);
    step.template operator()<false>(scale[1], a[0], scale[0]);
  } else {
    step.template operator()<false>(scale[0], a[1], scale[1]);
  }
  if (!staged && p.scales)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float of_row = load_float(p.scales, p.scale_type, whole_row + 8 * h);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int j = 0; j < 32; ++j)
          if (j / 2 % 2 == h) total[part][j] *= of_row;
    }

  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < kCols / 2; ++j)
    sums[Tile::sum_col(lane, j) * Tile::kPitchSum + Tile::sum_row(row_tile, lane, j)] = total[j / 32][j % 32];
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  const bool pairs = p.n % 2 == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kCols * Tile::kRows / 2; i += Tile::kConsumers) {
    const int row = i % (Tile::kRows / 2) * 2, col = i / (Tile::kRows / 2);
    const int64_t n = int64_t{tile_n0} * kTileN + row, m = m0 + col;
    if (n >= p.n || m >= p.m) continue;
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[e] = sums[col * Tile::kPitchSum + row + e];
      if (n + e >= p.n) continue;
      if (blockIdx.z == 0) v[e] += float_zero_term(p, n + e, m);
      if (p.bias && !p.parts) v[e] += load_float(p.bias, p.bias_type, n + e);
    }
    void* const out = p.parts ? p.parts : p.out;
    const Type type = p.parts ? Type::kF32 : p.out_type;
    const int64_t at = ((p.parts ? blockIdx.z * p.m : 0) + m) * p.n + n;
    if (pairs) {
      store_floats(out, type, at, v[0], v[1]);
    } else {
      store_float(out, type, at, v[0]);
      if (n + 1 < p.n) store_float(out, type, at + 1, v[1]);
    }
  }
}

}  // namespace lowbit::cuda
