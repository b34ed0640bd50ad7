// Binary weights with binary activations (XNOR-Net, Rastegari et al. 2016, arXiv 1603.05279): bit 1 is +1 and bit 0 is
// -1, so the sum of a group is count - 2 * popcount(x xor w). It is exact in int32, and fp32 follows in the order that
// reference.int8_linear states.
//
// A dword of a column holds the 32 weights of a chunk, even ones in the low half (core/n16.h). x is brought to that
// order once. Beyond k both hold zeros, which count for nothing.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Even bits to the low half, odd bits to the high half.
constexpr uint32_t unshuffle(uint32_t v) {
  const auto swap = [&](uint32_t mask, int shift) {
    const uint32_t t = (v ^ (v >> shift)) & mask;
    v ^= t ^ (t << shift);
  };
  swap(0x22222222, 1);
  swap(0x0C0C0C0C, 2);
  swap(0x00F000F0, 4);
  swap(0x0000FF00, 8);
  return v;
}
static_assert(unshuffle(0x55555555) == 0xFFFF && unshuffle(1u << 13) == 1u << 22 && unshuffle(4) == 2);

// Rows [begin, end) of signs as dwords.
inline void prepare_signs(const Launch& l, int64_t begin, int64_t end) {
  const int64_t chunks = num_chunks(l.k), bytes = ceil_div(l.k, 8);
  for (int64_t m = begin; m < end; ++m) {
    const uint8_t* x = static_cast<const uint8_t*>(l.x) + m * l.x_stride;
    uint8_t* out = static_cast<uint8_t*>(l.prepared) + m * l.prepared_stride;
    for (int64_t c = 0; c < chunks; ++c) {
      uint32_t bits = 0;
      const int64_t left = bytes - 4 * c, k_left = l.k - c * kChunkK;
      __builtin_memcpy(&bits, x + 4 * c, left < 4 ? left : 4);
      if (k_left < kChunkK) bits &= (1u << k_left) - 1;
      bits = unshuffle(bits);
      __builtin_memcpy(out + 4 * c, &bits, 4);
    }
  }
}

// y of kRows rows and kVecs vectors of columns from column lane0 of a block.
template <int kRows, int kVecs>
inline void signs_tile(const Launch& l, int64_t block, int64_t m0, int valid_rows, int lane0) {
  constexpr int kColumns = kVecs * kVecLanes;
  const int64_t chunks = num_chunks(l.k), chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
  const uint8_t* codes = l.codes + block * chunks * chunk_bytes(1);
  int64_t rows[kRows];
  const uint8_t* x[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = m0 + (r < valid_rows ? r : 0);
    x[r] = static_cast<const uint8_t*>(l.prepared) + rows[r] * l.prepared_stride;
  }
  alignas(64) float y[kRows][kColumns] = {};
  alignas(64) int32_t counted[kRows][kColumns] = {};  // of a group, before the chunks whose counts are in `sums`
  const auto each_sum = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kVecs>([&](auto v) LOWBIT_INLINE { fn(r, v); }); });
  };
  for (int64_t group = 0, c = 0; group < l.num_groups; ++group) {
    const int64_t group_begin = c, last = chunks - c < chunks_per_group ? chunks : c + chunks_per_group;
    const int64_t k_end = last * kChunkK < l.k ? last * kChunkK : l.k;
    const I size = set1_i(static_cast<int32_t>(k_end - group_begin * kChunkK));
    while (c < last) {
      const bool first = c == group_begin;
      const int64_t end = last - c < kCountChunks ? last : c + kCountChunks;
      I sums[kRows][kVecs];
      each_sum([&](auto r, auto v) LOWBIT_INLINE { sums[r][v] = set1_i(0); });
      for (; c < end; ++c) {
        I w[kVecs];
        unroll<kVecs>([&](auto v) LOWBIT_INLINE {
          const int lane = lane0 + v * kVecLanes;
          const uint8_t* at = codes + c * chunk_bytes(1) + lane * 4;
          prefetch(at + 6144);
          w[v] = load_i(at);
        });
        unroll<kRows>([&](auto r) LOWBIT_INLINE {
          int32_t bits;
          __builtin_memcpy(&bits, x[r] + 4 * c, 4);
          const I signs = set1_i(bits);
          unroll<kVecs>([&](auto v) LOWBIT_INLINE { sums[r][v] = add_popcounts(sums[r][v], xor_i(signs, w[v])); });
        });
      }
      each_sum([&](auto r, auto v) LOWBIT_INLINE {
        sums[r][v] = sum_popcounts(sums[r][v]);
        if (!first) sums[r][v] = add_i(sums[r][v], load_i(counted[r] + v * kVecLanes));
      });
      if (c < last) {
        each_sum([&](auto r, auto v) LOWBIT_INLINE { store_i(counted[r] + v * kVecLanes, sums[r][v]); });
        continue;
      }
      unroll<kVecs>([&](auto v) LOWBIT_INLINE {
        const F scale = group_scale(l, block, group, lane0 + v * kVecLanes);
        unroll<kRows>([&](auto r) LOWBIT_INLINE {
          float* to = y[r] + v * kVecLanes;
          const F dot = to_float(sub_i(size, shift_left<1>(sums[r][v])));
          store(to, add(load(to), mul(scale, dot)));
        });
      });
    }
  }
  const int64_t n0 = block * kBlockN + lane0;
  if (n0 >= l.n) return;
  for (int r = 0; r < valid_rows; ++r) {
    const F factor = set1(l.x_scales[rows[r]]);
    for (int i = 0; i < kColumns; i += kVecLanes) store(y[r] + i, mul(load(y[r] + i), factor));
    store_columns(l, rows[r], n0, kColumns, y[r]);
  }
}

template <int kRows>
inline void signs_rows(const Launch& l, int64_t block, int64_t m0, int valid_rows) {
  for (int lane = 0; lane < kBlockN; lane += kSignVecs * kVecLanes) {
    signs_tile<kRows, kSignVecs>(l, block, m0, valid_rows, lane);
  }
}

// A block's codes stay in L1 or L2 while the rows pass over them.
void signs_run(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t m0 = 0; m0 < l.m; m0 += kSignRows) {
      const int rows = l.m - m0 < kSignRows ? static_cast<int>(l.m - m0) : kSignRows;
      if (rows == 1) {
        signs_rows<1>(l, block, m0, rows);
      } else if (rows == 2) {
        signs_rows<2>(l, block, m0, rows);
      } else {
        signs_rows<kSignRows>(l, block, m0, rows);
      }
    }
  }
}

constexpr Kernel kXnorKernels[] = {{.name = LOWBIT_NAME("xnor", "b1", "lut1"),
                                    .op = Op::kLinear,
                                    .compute = Dtype::kB1,
                                    .codec = Codec::kLut,
                                    .bits = 1,
                                    .scope = Scope::kShared,
                                    .isa = LOWBIT_ISA_BIT,
                                    .chunk_groups = true,
                                    .exact_x = {.b1 = true},
                                    .prepare = prepare_signs,
                                    .run = signs_run}};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
