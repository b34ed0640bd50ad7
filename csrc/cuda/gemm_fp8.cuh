// P Q^T of FP8 matrices with wgmma (sm_90a): both operands come by the tensor memory accelerator, one producer thread
// fills a ring of stages, two warpgroups multiply. After every 128 of K the sums are added to fp32 registers,
// multiplied by the scales of the blocks: the tensor cores keep too few bits for long sums.
#pragma once

#include "codecs.cuh"
#include "fp8.h"
#include "hopper.cuh"
#include "tile.h"

namespace lowbit::cuda {

#define LOWBIT_WGMMA_FP8(COLS, TYPES, REGISTERS, A, B, ADDS)                                                     \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLS "k32.f32." TYPES \
  " {" REGISTERS "}, " A ", " B ", adds, 1, 1;\n}"
#define LOWBIT_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"

// c (64 x kCols) = A B, or += with `adds`; both operands by their descriptors.
template <bool kAE5m2, bool kBE5m2, int kCols>
__device__ __forceinline__ void multiply_fp8(float (&c)[kCols / 2], uint64_t a, uint64_t b, int adds) {
#define LOWBIT_MULTIPLY(TYPES)                                                                                     \
  if constexpr (kCols == 16)                                                                                       \
    asm volatile(LOWBIT_WGMMA_FP8("16", TYPES, LOWBIT_REGISTERS_8, "%8", "%9", "%10")                              \
                 : LOWBIT_8(0)                                                                                     \
                 : "l"(a), "l"(b), "r"(adds));                                                                     \
  else if constexpr (kCols == 64)                                                                                  \
    asm volatile(LOWBIT_WGMMA_FP8("64", TYPES, LOWBIT_REGISTERS_32, "%32", "%33", "%34")                           \
                 : LOWBIT_8(0), LOWBIT_8(8), LOWBIT_8(16), LOWBIT_8(24)                                            \
                 : "l"(a), "l"(b), "r"(adds));                                                                     \
  else                                                                                                             \
    asm volatile(LOWBIT_WGMMA_FP8("128", TYPES, LOWBIT_REGISTERS_64, "%64", "%65", "%66")                          \
                 : LOWBIT_8(0), LOWBIT_8(8), LOWBIT_8(16), LOWBIT_8(24), LOWBIT_8(32), LOWBIT_8(40), LOWBIT_8(48), \
                   LOWBIT_8(56)                                                                                    \
                 : "l"(a), "l"(b), "r"(adds))
  if constexpr (kAE5m2 && kBE5m2) {
    LOWBIT_MULTIPLY("e5m2.e5m2");
  } else if constexpr (kAE5m2) {
    LOWBIT_MULTIPLY("e5m2.e4m3");
  } else if constexpr (kBE5m2) {
    LOWBIT_MULTIPLY("e4m3.e5m2");
  } else {
    LOWBIT_MULTIPLY("e4m3.e4m3");
  }
#undef LOWBIT_MULTIPLY
}

__device__ __forceinline__ float scale_of(const Fp8Operand& o, int64_t row, int block, int blocks) {
  return __ldg(o.scales + scale_index(o.kind, o.rows, row, block, blocks));
}

template <bool kPE5m2, bool kQE5m2, int kCols, BlockScales kBlocks>
__global__ void __launch_bounds__(Fp8Tile<kCols>::kThreads, 1)
    fp8_kernel(__grid_constant__ const CUtensorMap p_map, __grid_constant__ const CUtensorMap q_map,
               const Fp8Product x) {
  using Tile = Fp8Tile<kCols>;
  extern __shared__ __align__(1024) uint8_t fp8_stages[];
  uint8_t* const ring = fp8_stages;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int blocks = static_cast<int>(ceil_div(x.k, Tile::kK));
  const Place place = place_of(blockIdx.x, static_cast<int>(ceil_div(x.p.rows, Tile::kRows)),
                               static_cast<int>(ceil_div(x.q.rows, kCols)), Tile::kBand);
  const int64_t p0 = place.row * int64_t{Tile::kRows}, q0 = place.column * int64_t{kCols};
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + Tile::kStages * Tile::kStageBytes);
  uint64_t* const empty = full + Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, Tile::kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (threadIdx.x >= Tile::kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x != Tile::kConsumers) return;
    for (int i = 0; i < blocks; ++i) {
      const int slot = i % Tile::kStages;
      uint8_t* const stage = ring + slot * Tile::kStageBytes;
      if (i >= Tile::kStages) barrier_wait(empty + slot, (i / Tile::kStages - 1) & 1);
      barrier_expect(full + slot, Tile::kStageBytes);
      copy_tile(stage, &p_map, i * Tile::kK, static_cast<int>(p0), full + slot);
      copy_tile(stage + Tile::q_offset(), &q_map, i * Tile::kK, static_cast<int>(q0), full + slot);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  // While the sums of one block of K are scaled and added, the products of the next are on their way.
  float acc[2][kCols / 2], total[kCols / 2] = {};
  // Scales of blocks multiply here, those of rows at the end; they are loaded two blocks ahead.
  const bool p_scaled = kBlocks != BlockScales::kNone && by_block(x.p.kind);
  const bool q_scaled = kBlocks == BlockScales::kRows && by_block(x.q.kind);
  float scales[2][3] = {{1, 1, 1}, {1, 1, 1}};
  const auto load_scales = [&](int i, float (&to)[3]) {
    if (p_scaled && i < blocks)
#pragma unroll
      for (int h = 0; h < 2; ++h) to[h] = scale_of(x.p, p0 + Tile::sum_row(warp, lane, 2 * h), i, blocks);
    if (q_scaled && i < blocks) to[2] = scale_of(x.q, q0, i, blocks);
  };
  load_scales(0, scales[0]), load_scales(1, scales[1]);
  int begun_slot = 0, begun_parity = 0, slot = 0;
  const auto begin = [&](float (&c)[kCols / 2]) {
    const uint32_t stage = address_of(ring + begun_slot * Tile::kStageBytes);
    const uint64_t p = tile_descriptor(stage + Tile::p_offset(warp / 4)), q = tile_descriptor(stage + Tile::q_offset());
    barrier_wait(full + begun_slot, begun_parity);
    multiply_begin(c);
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) multiply_fp8<kPE5m2, kQE5m2, kCols>(c, p + 2 * s, q + 2 * s, s > 0);
    multiply_commit();
    if (++begun_slot == Tile::kStages) begun_slot = 0, begun_parity ^= 1;
  };
  const auto step = [&]<bool kMore>(int i, float (&c)[kCols / 2], float (&next)[kCols / 2], float (&s)[3]) {
    if constexpr (kMore) begin(next);
    multiply_wait<kMore ? 1 : 0>(c);
    if (lane == 0) barrier_arrive(empty + slot);
    if (++slot == Tile::kStages) slot = 0;
    if constexpr (kBlocks == BlockScales::kNone) {
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j) total[j] += c[j];
    } else if constexpr (kBlocks == BlockScales::kRows) {
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j) total[j] = fmaf(s[j / 2 % 2] * s[2], c[j], total[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j) {
        const int column_at = min(static_cast<int>(q0) + Tile::sum_col(lane, j), static_cast<int>(x.q.rows) - 1);
        const float column = __ldg(x.q.scales + static_cast<uint32_t>(column_at) * blocks + i);
        total[j] = fmaf(s[j / 2 % 2] * column, c[j], total[j]);
      }
    }
    if constexpr (kBlocks != BlockScales::kNone && kMore) load_scales(i + 2, s);
  };
  begin(acc[0]);
  int i = 0;
#pragma unroll 1
  for (; i + 2 < blocks; i += 2) {
    step.template operator()<true>(i, acc[0], acc[1], scales[0]);
    step.template operator()<true>(i + 1, acc[1], acc[0], scales[1]);
  }
  if (i + 1 < blocks) {
    step.template operator()<true>(i, acc[0], acc[1], scales[0]);
    step.template operator()<false>(i + 1, acc[1], acc[0], scales[1]);
  } else {
    step.template operator()<false>(i, acc[0], acc[1], scales[0]);
  }

  if (!x.transposed) {
    // Lanes of four have eight columns of a row side by side.
    const bool pairs = x.q.rows % 2 == 0, p_whole = !by_block(x.p.kind), q_whole = !by_block(x.q.kind);
    float of_row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      of_row[h] = p_whole ? scale_of(x.p, p0 + Tile::sum_row(warp, lane, 2 * h), 0, blocks) : 1.0f;
#pragma unroll
    for (int j = 0; j < kCols / 2; j += 4) {
      const int64_t q = q0 + Tile::sum_col(lane, j);
      if (q >= x.q.rows) continue;
      float of_column[2], bias[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        of_column[e] = q_whole ? scale_of(x.q, q + e, 0, blocks) : 1.0f;
        if (x.bias) bias[e] = load_float(x.bias, x.bias_type, min(q + e, x.q.rows - 1));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t p = p0 + Tile::sum_row(warp, lane, 2 * h), at = p * x.q.rows + q;
        if (p >= x.p.rows) continue;
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) v[e] = total[j + 2 * h + e] * of_row[h] * of_column[e] + bias[e];
        if (pairs) {
          store_floats(x.out, x.out_type, at, v[0], v[1]);
        } else {
          store_float(x.out, x.out_type, at, v[0]);
          if (q + 1 < x.q.rows) store_float(x.out, x.out_type, at + 1, v[1]);
        }
      }
    }
    return;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < kCols / 2; ++j)
    sums[Tile::sum_col(lane, j) * Tile::kPitchSum + Tile::sum_row(warp, lane, j)] = total[j];
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  for (int e = threadIdx.x; e < kCols * Tile::kRows; e += Tile::kConsumers) {
    // Rows of P, which is b, are columns of y.
    const int row = e % Tile::kRows, col = e / Tile::kRows;
    const int64_t p = p0 + row, q = q0 + col;
    if (p >= x.p.rows || q >= x.q.rows) continue;
    float v = sums[col * Tile::kPitchSum + row];
    if (!by_block(x.p.kind)) v *= scale_of(x.p, p, 0, blocks);
    if (!by_block(x.q.kind)) v *= scale_of(x.q, q, 0, blocks);
    if (x.bias) v += load_float(x.bias, x.bias_type, p);
    store_float(x.out, x.out_type, q * x.p.rows + p, v);
  }
}

}  // namespace lowbit::cuda
