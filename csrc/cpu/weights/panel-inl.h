// Large products and dequantize in fp32: a panel of 64 columns is dequantized once (scale and zero applied, any group
// size, any table scope) and multiplied with many rows.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kPanelChunks = 4;        // 128 weights x 64 columns of fp32 = 32 KiB
constexpr int64_t kRowsPerTask = 192;  // 48 KiB of fp32 sums

// panel[i][column] = W[column, first chunk * 32 + i]; zero beyond k.
template <class C>
inline void decode_panel(const Launch& l, const C& codec, int64_t block, int64_t chunk_begin, int64_t chunk_end,
                         float* panel) {
  constexpr int kBits = C::kBits;
  const uint8_t* codes = l.codes + block * num_chunks(l.k) * chunk_bytes(kBits);
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    float* out = panel + (c - chunk_begin) * kChunkK * kBlockN;
    const int64_t k0 = c * kChunkK;
    const int64_t valid = l.k - k0 < kChunkK ? l.k - k0 : kChunkK;
    int64_t group_of[kChunkK];
    for (int64_t i = 0; i < kChunkK; ++i) group_of[i] = (i < valid ? k0 + i : l.k - 1) / l.group;
    for (int lane = 0; lane < kBlockN; lane += kVecLanes) {
      const uint8_t* columns =
          codes + c * chunk_bytes(kBits) + lane / kUnitLanes * vector_bytes(kBits) + lane % kUnitLanes * 4;
      unroll<kChunkK>([&](auto s) LOWBIT_INLINE {
        const auto of_group = codec.at(block, group_of[s], lane);
        store(out + s * kBlockN + lane, codec.template value<s>(columns, of_group));
      });
      for (int64_t i = 0; i < valid;) {
        const int64_t group = group_of[i];
        const GroupTerms t = group_terms(l, block, group, lane);
        for (; i < valid && group_of[i] == group; ++i) {
          const F v = load(out + i * kBlockN + lane);
          const F w = l.zero == ZeroMode::kAdd ? add(mul(t.scale, v), t.zero) : mul(t.scale, sub(v, t.zero));
          store(out + i * kBlockN + lane, w);
        }
      }
    }
  }
}

// y[r][column] += sum over i < depth of x[r][i] * panel[i][column].
template <int kRows>
inline void multiply_panel(const float* x, int64_t x_stride, const float* panel, int64_t depth, float* y) {
  for (int lane = 0; lane < kBlockN; lane += kPanelVecs * kVecLanes) {
    F acc[kRows][kPanelVecs];
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kPanelVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = zero(); }); });
    for (int64_t i = 0; i < depth; ++i) {
      F w[kPanelVecs];
      unroll<kPanelVecs>([&](auto v) LOWBIT_INLINE { w[v] = load(panel + i * kBlockN + lane + v * kVecLanes); });
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const F xi = set1(x[r * x_stride + i]);
        unroll<kPanelVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = fma(xi, w[v], acc[r][v]); });
      });
    }
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      unroll<kPanelVecs>([&](auto v) LOWBIT_INLINE {
        float* sum = y + r * kBlockN + lane + v * kVecLanes;
        store(sum, add(load(sum), acc[r][v]));
      });
    });
  }
}

// Tasks run through the row blocks of one column block before the next.
template <class C>
void gemm_run(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  alignas(64) float panel[kPanelChunks * kChunkK * kBlockN];
  alignas(64) float y[kRowsPerTask * kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kRowsPerTask), chunks = num_chunks(l.k);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / row_blocks, m0 = task % row_blocks * kRowsPerTask;
    const int64_t rows = l.m - m0 < kRowsPerTask ? l.m - m0 : kRowsPerTask;
    __builtin_memset(y, 0, rows * kBlockN * sizeof(float));
    for (int64_t c = 0; c < chunks; c += kPanelChunks) {
      const int64_t c_end = c + kPanelChunks < chunks ? c + kPanelChunks : chunks;
      decode_panel(l, codec, block, c, c_end, panel);
      const float* x = static_cast<const float*>(l.prepared) + m0 * l.prepared_stride + c * kChunkK;
      const int64_t depth = (c_end - c) * kChunkK;
      int64_t r = 0;
      for (; r + kPanelRows <= rows; r += kPanelRows) {
        multiply_panel<kPanelRows>(x + r * l.prepared_stride, l.prepared_stride, panel, depth, y + r * kBlockN);
      }
      for (; r + 2 <= rows; r += 2) {
        multiply_panel<2>(x + r * l.prepared_stride, l.prepared_stride, panel, depth, y + r * kBlockN);
      }
      if (r < rows) multiply_panel<1>(x + r * l.prepared_stride, l.prepared_stride, panel, depth, y + r * kBlockN);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_columns(l, m0 + r, block * kBlockN, kBlockN, y + r * kBlockN);
    }
  }
}

// out[n][k] in row-major order. Tasks are column blocks.
template <class C>
void dequantize_run(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  alignas(64) float panel[kChunkK * kBlockN];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n0 = block * kBlockN;
    const int64_t columns = l.n - n0 < kBlockN ? l.n - n0 : kBlockN;
    for (int64_t c = 0; c < num_chunks(l.k); ++c) {
      decode_panel(l, codec, block, c, c + 1, panel);
      const int64_t k0 = c * kChunkK;
      const int64_t count = l.k - k0 < kChunkK ? l.k - k0 : kChunkK;
      for (int64_t n = 0; n < columns; ++n) {
        alignas(64) float row[kChunkK];
        for (int i = 0; i < kChunkK; ++i) row[i] = panel[i * kBlockN + n];
        store_as(l.out, l.out_dtype, (n0 + n) * l.out_stride + k0, row, count);
      }
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
