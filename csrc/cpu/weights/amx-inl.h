// bf16 activations with AMX: many rows of x against panels of table entries as bf16, decoded as for vdpbf16ps
// (bf16-inl.h). A panel [pair][64 columns][2] is what tdpbf16ps wants of weights, and prepared chunks [row][32] what it
// wants of x. The sums of a group leave the tiles to be scaled, so that no scale is rounded. A product of 16 rows and
// 16 columns by 32 weights takes 16 cycles (Sapphire Rapids), where vdpbf16ps takes 512.
#pragma once

#include <utility>

#include "cpu/weights/bf16-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kTile = 16;
constexpr int kTilePairs = 2;  // tiles of rows, and of columns, that are multiplied together
constexpr int64_t kAmxRowsPerTask = 512;
static_assert(kAmxRowsPerTask <= kWordRowsPerTask && kAmxRowsPerTask % (kTilePairs * kTile) == 0);

// Memory is as the source says by now: GCC 12 does not know what the instructions of tiles read.
inline void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Rows of the tiles 0 to 3 (sums), 4 and 5 (x), 6 and 7 (weights); each row has 64 bytes.
inline void configure_tiles(int first_rows, int second_rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows, first_rows, second_rows, kTile, kTile};
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = rows[i] ? 64 : 0;
    config.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  written(&config);
  _tile_loadconfig(&config);
}

// Adds the sums of a tile to those of its rows: to `y`, scaled, where a group ends, and else to `carry`.
struct AmxSums {
  const Launch& l;
  const Span& span;
  const PanelTerms& terms;
  float *carry, *y;  // (rows, 64), from the first row of the two tiles on
  int64_t row;       // of x

  void add_tile(const float* sums, int64_t first, int64_t rows, int lane, int64_t index, int64_t group) const {
    const GroupTerms own = terms.at(index, lane);
    for (int64_t r = first; r < first + rows; ++r, sums += kTile) {
      float* to = y + r * kBlockN + lane;
      F acc = load(sums);
      if (span.carries) {
        float* kept = carry + r * kBlockN + lane;
        acc = add(acc, load(kept));
        store(kept, zero());
      }
      const float x_sum = l.x_sums ? l.x_sums[(row + r) * l.num_groups + group] : 0.0f;
      store(to, finish_group(l, own, load(to), acc, x_sum));
    }
  }
  void keep_tile(const float* sums, int64_t first, int64_t rows, int lane) const {
    for (int64_t r = first; r < first + rows; ++r, sums += kTile) {
      float* kept = carry + r * kBlockN + lane;
      store(kept, add(load(kept), load(sums)));
    }
  }
};

// Multiplies a panel by one tile of rows of x, or by two.
template <bool kTwo>
inline void multiply_tiles(const AmxSums& to, const uint16_t* panel, int64_t rows) {
  const Launch& l = to.l;
  const Span& span = to.span;
  const uint16_t* x = static_cast<const uint16_t*>(l.prepared) + to.row * kChunkK;
  const int64_t chunks = num_chunks(l.k), first_group = span.group_of(span.chunk);
  const int64_t first = rows < kTile ? rows : kTile, second = rows - first;
  constexpr int64_t kStride = 2 * sizeof(uint16_t) * kBlockN;
  alignas(64) float sums[4][kTile * kTile];
  for (int lane = 0; lane < kBlockN; lane += 2 * kUnitLanes) {
    const auto clear = [] {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    };
    const auto take = [&] {
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      if constexpr (kTwo) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
      }
      clear();
    };
    clear();
    bool empty = true;
    for (int64_t c = span.chunk; c < span.chunk_end; ++c) {
      const uint16_t* xc = x + c * l.m * kChunkK;
      const uint16_t* w = panel + (c - span.chunk) * kPairsPerChunk * 2 * kBlockN + 2 * lane;
      _tile_loadd(4, xc, 64);
      _tile_loadd(6, w, kStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + 2 * kUnitLanes, kStride);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, xc + kTile * kChunkK, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      empty = false;
      if ((c + 1) % span.chunks_per_group != 0 && c + 1 < chunks) continue;
      const int64_t group = c / span.chunks_per_group;
      take();
      empty = true;
      for (int i = 0; i < 2; ++i) {
        to.add_tile(sums[i], 0, first, lane + i * kUnitLanes, group - first_group, group);
        if constexpr (kTwo) {
          to.add_tile(sums[2 + i], kTile, second, lane + i * kUnitLanes, group - first_group, group);
        }
      }
    }
    if (empty) continue;
    take();
    for (int i = 0; i < 2; ++i) {
      to.keep_tile(sums[i], 0, first, lane + i * kUnitLanes);
      if constexpr (kTwo) to.keep_tile(sums[2 + i], kTile, second, lane + i * kUnitLanes);
    }
  }
}

template <class C>
void gemm_amx_run(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  alignas(64) uint16_t panel[kWordPanelChunks * kChunkK * kBlockN];
  PanelTerms terms;
  alignas(64) float carry[kAmxRowsPerTask * kBlockN];
  alignas(64) float y[kAmxRowsPerTask * kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kAmxRowsPerTask), chunks = num_chunks(l.k);
  constexpr int64_t kStep = kTilePairs * kTile;
  for (int64_t task = begin; task < end; ++task) {
    Span span{};
    span.block = task / row_blocks;
    span.first_row = task % row_blocks * kAmxRowsPerTask;
    span.chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
    span.carries = span.chunks_per_group > kWordPanelChunks;
    const int64_t panel_chunks =
        span.carries ? kWordPanelChunks : kWordPanelChunks / span.chunks_per_group * span.chunks_per_group;
    const int64_t left = l.m - span.first_row, rows = left < kAmxRowsPerTask ? left : kAmxRowsPerTask;
    const int64_t rest = rows % kStep;
    __builtin_memset(carry, 0, rows * kBlockN * sizeof(float));
    __builtin_memset(y, 0, rows * kBlockN * sizeof(float));
    for (span.chunk = 0; span.chunk < chunks; span.chunk = span.chunk_end) {
      span.chunk_end = span.chunk + panel_chunks < chunks ? span.chunk + panel_chunks : chunks;
      decode_words(l, codec, span, panel);
      written(panel);
      terms.read(l, span);
      const auto sums_from = [&](int64_t r) {
        return AmxSums{l, span, terms, carry + r * kBlockN, y + r * kBlockN, span.first_row + r};
      };
      if (rest < rows) configure_tiles(kTile, kTile);
      for (int64_t r = 0; r + kStep <= rows; r += kStep) multiply_tiles<true>(sums_from(r), panel, kStep);
      if (rest > kTile) {
        configure_tiles(kTile, static_cast<int>(rest - kTile));
        multiply_tiles<true>(sums_from(rows - rest), panel, rest);
      } else if (rest > 0) {
        configure_tiles(static_cast<int>(rest), 0);
        multiply_tiles<false>(sums_from(rows - rest), panel, rest);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_columns(l, span.first_row + r, span.block * kBlockN, kBlockN, y + r * kBlockN);
    }
  }
  _tile_release();
}

template <int B>
constexpr Kernel gemm_amx(const char* name) {
  Kernel kernel = gemm_bf16<B>(name);
  kernel.isa = kAmxBf16;
  kernel.rows_per_task = kAmxRowsPerTask;
  kernel.run = gemm_amx_run<WordLut<B>>;
  kernel.half_groups = false;
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
