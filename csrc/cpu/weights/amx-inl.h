// bf16 activations with AMX: many rows of x against panels of table entries as bf16, decoded as for vdpbf16ps
// (bf16-inl.h). A panel [pair][64 columns][2] is what tdpbf16ps wants of weights, and blocks of 16 rows of x, each
// [k / 32][row][32], what it wants of x. The sums of a group leave the tiles to be scaled, so that no scale is rounded.
// A product of 16 rows and 16 columns by 32 weights takes 16 cycles (Sapphire Rapids), where vdpbf16ps takes 512.
#pragma once

#include "cpu/weights/bf16-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kTile = 16;           // rows, and columns, of a tile of sums
constexpr int kAmxPanelChunks = 4;  // 32 KiB, which stay in L1 beside the 8 KiB of the rows that they meet
constexpr int64_t kAmxRowsPerTask = 512;
static_assert(kAmxRowsPerTask % kTile == 0 && kBlockN / kTile == kColumnVecs && kUnitLanes == kTile);

// Memory is as the source says by now: GCC 12 does not know what the instructions of tiles read.
inline void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Tiles 0 to 3 (sums), 4 and 5 (x) have so many rows, 6 and 7 (weights) one for each pair; x has as many pairs in a
// row.
inline void configure_tiles(int rows, int pairs) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * pairs : 64);
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : pairs);
  }
  written(&config);
  _tile_loadconfig(&config);
}

// Steps of a product: the 32 weights of a chunk, or 16 where groups are half a chunk.
struct Steps {
  int64_t size, count, per_group;
  explicit Steps(const Launch& l)
      : size(halves_chunks(l.group, l.k) ? kHalfChunk : kChunkK),
        count(ceil_div(l.k, size)),
        per_group(l.num_groups == 1 ? count : l.group / size) {}
  int pairs() const { return static_cast<int>(size / 2); }
  // Of a panel: whole groups, or a part of one.
  int64_t per_panel() const {
    const int64_t most = kAmxPanelChunks * kChunkK / size;
    return per_group > most ? most : most / per_group * per_group;
  }
};

// At most 16 rows of x against a panel, its steps [begin, end).
struct TileProduct {
  const Launch& l;
  const Steps& steps;
  int64_t begin, end, row, rows;
  const uint16_t* panel;
  const PanelTerms<kAmxPanelChunks>& terms;
  float *carry, *y;  // [column / 16][row][16] of a group that is not yet whole, and (16, 64)
  const uint16_t* x = static_cast<const uint16_t*>(l.prepared) + row * num_chunks(l.k) * kChunkK;

  const uint16_t* x_at(int64_t step) const {
    const int64_t at = step * steps.size;
    return x + at / kChunkK * rows * kChunkK + at % kChunkK;
  }
  const uint16_t* weights_at(int64_t step) const { return panel + (step - begin) * steps.size * kBlockN; }
  // The x and the sums of the next rows, which wait in L2.
  void prefetch_next(int64_t step) const {
    const uint16_t* next = x_at(step) + rows * num_chunks(l.k) * kChunkK;
    const float* sums = (steps.per_group > steps.per_panel() ? carry : y) + kTile * kBlockN;
    sums += (step - begin) % kAmxPanelChunks * (kTile * kTile);
    unroll<kTile>([&](auto r) LOWBIT_INLINE {
      prefetch(next + r * kChunkK);
      prefetch(sums + r * kTile);
    });
  }
  // Of each row the sum of the x of a group. Rows that there are not have sums of 0.
  template <ZeroMode kZero>
  void read_x_sums(int64_t group, float* sums) const {
    if constexpr (kZero == ZeroMode::kNone) return;
    for (int64_t r = 0; r < kTile; ++r) sums[r] = r < rows ? l.x_sums[(row + r) * l.num_groups + group] : 0.0f;
  }
};

constexpr int64_t kWeightStride = 2 * sizeof(uint16_t) * kBlockN;

// Where a group is a step: y stays in registers. Four products at a time, of which none waits for the sums of another.
template <ZeroMode kZero>
void multiply_steps(const TileProduct& p) {
  alignas(64) float sums[4][kTile * kTile] = {}, x_sums[2 * kAmxPanelChunks][kTile] = {};
  for (int64_t step = p.begin; step < p.end; ++step) {
    p.prefetch_next(step);
    p.read_x_sums<kZero>(step, x_sums[step - p.begin]);
  }
  for (int v = 0; v < kColumnVecs; ++v) {
    F y[kTile];
    unroll<kTile>([&](auto r) LOWBIT_INLINE { y[r] = load(p.y + r * kBlockN + v * kTile); });
    const auto finish = [&](int64_t step, const float* from) LOWBIT_INLINE {
      const GroupTerms terms = p.terms.at(step - p.begin, v * kTile);
      const float* of_rows = x_sums[step - p.begin];
      unroll<kTile>([&](auto r)
                        LOWBIT_INLINE { y[r] = finish_group<kZero>(terms, y[r], load(from + r * kTile), of_rows[r]); });
    };
#define LOWBIT_MULTIPLY(sum, x, w, step)                             \
  _tile_zero(sum);                                                   \
  _tile_loadd(x, p.x_at(step), 2 * kChunkK);                         \
  _tile_loadd(w, p.weights_at(step) + 2 * kTile * v, kWeightStride); \
  _tile_dpbf16ps(sum, x, w)
    int64_t step = p.begin;
    for (; step + 4 <= p.end; step += 4) {
      LOWBIT_MULTIPLY(0, 4, 6, step);
      LOWBIT_MULTIPLY(1, 5, 7, step + 1);
      LOWBIT_MULTIPLY(2, 4, 6, step + 2);
      LOWBIT_MULTIPLY(3, 5, 7, step + 3);
      _tile_stored(0, sums[0], 64);
      finish(step, sums[0]);
      _tile_stored(1, sums[1], 64);
      finish(step + 1, sums[1]);
      _tile_stored(2, sums[2], 64);
      finish(step + 2, sums[2]);
      _tile_stored(3, sums[3], 64);
      finish(step + 3, sums[3]);
    }
    for (; step < p.end; ++step) {
      LOWBIT_MULTIPLY(0, 4, 6, step);
      _tile_stored(0, sums[0], 64);
      finish(step, sums[0]);
    }
#undef LOWBIT_MULTIPLY
    unroll<kTile>([&](auto r) LOWBIT_INLINE { store(p.y + r * kBlockN + v * kTile, y[r]); });
  }
}

// Where a group is several: all columns together.
template <ZeroMode kZero>
void multiply_groups(const TileProduct& p) {
  alignas(64) float sums[kColumnVecs][kTile * kTile] = {}, x_sums[kTile] = {};
  const auto clear = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  };
  const auto take = [](float (*to)[kTile* kTile]) {
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[1], 64);
    _tile_stored(2, to[2], 64);
    _tile_stored(3, to[3], 64);
  };
  auto* carry = reinterpret_cast<float (*)[kTile * kTile]>(p.carry);
  const int64_t per_group = p.steps.per_group;
  if (p.begin % per_group == 0) {
    clear();
  } else {
    _tile_loadd(0, carry[0], 64);
    _tile_loadd(1, carry[1], 64);
    _tile_loadd(2, carry[2], 64);
    _tile_loadd(3, carry[3], 64);
  }
  for (int64_t step = p.begin; step < p.end; ++step) {
    const uint16_t* w = p.weights_at(step);
    p.prefetch_next(step);
    _tile_loadd(4, p.x_at(step), 2 * kChunkK);
    _tile_loadd(6, w, kWeightStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 2 * kTile, kWeightStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, w + 4 * kTile, kWeightStride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, w + 6 * kTile, kWeightStride);
    _tile_dpbf16ps(3, 4, 7);
    if ((step + 1) % per_group != 0 && step + 1 < p.steps.count) continue;
    take(sums);
    clear();
    const int64_t group = step / per_group;
    p.read_x_sums<kZero>(group, x_sums);
    for (int v = 0; v < kColumnVecs; ++v) {
      const GroupTerms terms = p.terms.at(group - p.begin / per_group, v * kTile);
      for (int r = 0; r < kTile; ++r) {
        float* to = p.y + r * kBlockN + v * kTile;
        store(to, finish_group<kZero>(terms, load(to), load(sums[v] + r * kTile), x_sums[r]));
      }
    }
  }
  if (p.end % per_group != 0 && p.end < p.steps.count) take(carry);
}

template <ZeroMode kZero>
void multiply_tiles(const TileProduct& p) {
  (p.steps.per_group == 1 ? multiply_steps<kZero> : multiply_groups<kZero>)(p);
}

// Rows [begin, end) of bf16 x: blocks of 16 rows, each [k / 32][row][32], zero beyond k.
inline void prepare_amx(const Launch& l, int64_t begin, int64_t end) {
  const int64_t chunks = num_chunks(l.k);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t first = m / kTile * kTile, rows = l.m - first < kTile ? l.m - first : kTile;
    uint16_t* block = static_cast<uint16_t*>(l.prepared) + first * chunks * kChunkK;
    copy_chunks(l, m, block + (m - first) * kChunkK, rows * kChunkK);
  }
}

template <class C>
void gemm_amx_run(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  const Steps steps(l);
  alignas(64) uint16_t panel[kAmxPanelChunks * kChunkK * kBlockN];
  PanelTerms<kAmxPanelChunks> terms;
  alignas(64) float carry[kAmxRowsPerTask * kBlockN];
  alignas(64) float y[kAmxRowsPerTask * kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kAmxRowsPerTask), per_panel = steps.per_panel();
  const auto multiply = l.zero == ZeroMode::kNone       ? multiply_tiles<ZeroMode::kNone>
                        : l.zero == ZeroMode::kSubtract ? multiply_tiles<ZeroMode::kSubtract>
                                                        : multiply_tiles<ZeroMode::kAdd>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first_row = task % row_blocks * kAmxRowsPerTask, left = l.m - first_row;
    const int64_t rows = left < kAmxRowsPerTask ? left : kAmxRowsPerTask, rest = rows % kTile;
    Span span{};
    span.block = task / row_blocks;
    span.halves = steps.size < kChunkK;
    span.chunks_per_group = span.halves ? 1 : steps.per_group;
    __builtin_memset(y, 0, ceil_div(rows, kTile) * kTile * kBlockN * sizeof(float));
    for (int64_t step = 0; step < steps.count; step += per_panel) {
      const int64_t step_end = step + per_panel < steps.count ? step + per_panel : steps.count;
      span.chunk = step * steps.size / kChunkK;
      span.chunk_end = ceil_div(step_end * steps.size, kChunkK);
      decode_words(l, codec, span, panel);
      written(panel);
      terms.read(l, span);
      const auto multiply_from = [&](int64_t r, int64_t count) {
        multiply({l, steps, step, step_end, first_row + r, count, panel, terms, carry + r * kBlockN, y + r * kBlockN});
      };
      if (rest < rows) configure_tiles(kTile, steps.pairs());
      for (int64_t r = 0; r + kTile <= rows; r += kTile) multiply_from(r, kTile);
      if (rest > 0) {
        configure_tiles(static_cast<int>(rest), steps.pairs());
        multiply_from(rows - rest, rest);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_columns(l, first_row + r, span.block * kBlockN, kBlockN, y + r * kBlockN);
    }
  }
  _tile_release();
}

template <int B>
constexpr Kernel gemm_amx(const char* name) {
  Kernel kernel = gemm_bf16<B>(name);
  kernel.isa = kAmxBf16;
  kernel.prepare = prepare_amx;
  kernel.rows_per_task = kAmxRowsPerTask;
  kernel.run = gemm_amx_run<WordLut<B>>;
  return kernel;
}
template <int B>
constexpr Kernel pair_gemm_amx(const char* name) {
  Kernel kernel = gemm_amx<B>(name);
  kernel.scope = Scope::kPair;
  kernel.run = gemm_amx_run<WordPairLut<B>>;
  return kernel;
}

#define LOWBIT_KERNELS(B) gemm_amx<B>(LOWBIT_NAME("gemm", "bf16", "lut" #B)),
#define LOWBIT_PAIR_KERNELS(B) pair_gemm_amx<B>(LOWBIT_NAME("gemm", "bf16", "pairlut" #B)),
constexpr Kernel kAmxKernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_KERNELS) LOWBIT_FOREACH_PAIR_BITS(LOWBIT_PAIR_KERNELS)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
