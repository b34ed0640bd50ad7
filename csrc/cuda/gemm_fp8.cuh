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

template <bool kPE5m2, bool kQE5m2, int kCols, bool kBlocks>
__global__ void __launch_bounds__(Fp8Tile<kCols>::kThreads, 1)
    fp8_kernel(__grid_constant__ const CUtensorMap p_map, __grid_constant__ const CUtensorMap q_map,
               const Fp8Product x) {
  using Tile = Fp8Tile<kCols>;
  extern __shared__ __align__(1024) uint8_t fp8_stages[];
  uint8_t* const ring = fp8_stages;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int blocks = static_cast<int>(ceil_div(x.k, Tile::kK));
  const int64_t p0 = blockIdx.x * int64_t{Tile::kRows}, q0 = blockIdx.y * int64_t{kCols};
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + Tile::kStages * Tile::kStageBytes);
  uint64_t* const empty = full + Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, Tile::kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (threadIdx.x >= Tile::kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
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

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float acc[kCols / 2], total[kCols / 2] = {};
  for (int i = 0; i < blocks; ++i) {
    const int slot = i % Tile::kStages;
    const uint32_t stage = address_of(ring + slot * Tile::kStageBytes);
    const uint64_t p = tile_descriptor(stage + Tile::p_offset(warp / 4)), q = tile_descriptor(stage + Tile::q_offset());
    float scale[2] = {1, 1};
    if constexpr (kBlocks)
#pragma unroll
      for (int h = 0; h < 2; ++h) scale[h] = scale_of(x.p, p0 + Tile::sum_row(warp, lane, 2 * h), i, blocks);
    const bool same = kBlocks && x.q.kind != Scales::kBlock1x128 && x.q.kind != Scales::kRow;
    const float q_scale = same ? scale_of(x.q, q0, i, blocks) : 1.0f;
    barrier_wait(full + slot, i / Tile::kStages & 1);
    multiply_begin(acc);
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) multiply_fp8<kPE5m2, kQE5m2, kCols>(acc, p + 2 * s, q + 2 * s, s > 0);
    multiply_commit();
    multiply_wait(acc);
    if (lane == 0) barrier_arrive(empty + slot);
#pragma unroll
    for (int j = 0; j < kCols / 2; ++j) {
      float factor = 1;
      if constexpr (kBlocks)
        factor = scale[j / 2 % 2] * (same ? q_scale : scale_of(x.q, q0 + Tile::sum_col(lane, j), i, blocks));
      total[j] += kBlocks ? factor * acc[j] : acc[j];
    }
  }

  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < kCols / 2; ++j)
    sums[Tile::sum_col(lane, j) * Tile::kPitchSum + Tile::sum_row(warp, lane, j)] = total[j];
  asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers) : "memory");
  for (int i = threadIdx.x; i < kCols * Tile::kRows; i += Tile::kConsumers) {
    // Columns of y side by side: rows of P where P is b.
    const int row = x.transposed ? i % Tile::kRows : i / kCols, col = x.transposed ? i / Tile::kRows : i % kCols;
    const int64_t p = p0 + row, q = q0 + col, m = x.transposed ? q : p, n = x.transposed ? p : q;
    if (p >= x.p.rows || q >= x.q.rows) continue;
    float v = sums[col * Tile::kPitchSum + row];
    if constexpr (!kBlocks) v *= scale_of(x.p, p, 0, blocks) * scale_of(x.q, q, 0, blocks);
    if (x.bias) v += load_float(x.bias, x.bias_type, n);
    store_float(x.out, x.out_type, m * (x.transposed ? x.p.rows : x.q.rows) + n, v);
  }
}

}  // namespace lowbit::cuda
