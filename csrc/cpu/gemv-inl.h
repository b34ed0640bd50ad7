// GEMV and skinny products: y(m, 64 columns) over the whole K, codes read once and decoded in registers. Groups are
// multiples of kChunkK. A group's products are summed apart and scaled once.
#pragma once

#include "cpu/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// How far ahead of the codes being decoded the stream is fetched: 4 to 8 KiB measured best.
constexpr int64_t kPrefetchBytes = 6144;

// A long group is summed in pieces of 256 weights: one long chain of additions would round worse than a dense product.
constexpr int64_t kSumChunks = 8;

template <class Compute, int kRows>
inline void gemv_tile(const Launch& l, const typename Compute::Codec& codec, int64_t block, int64_t m0, int valid_rows,
                      int lane0) {
  using X = typename Compute::X;
  constexpr int kBits = Compute::Codec::kBits;
  constexpr int kSteps = kChunkK / Compute::kStepK;
  // Independent sums hide the latency of the multiply-add when few rows share a decoded value.
  constexpr int kParts = kRows <= 2 ? 2 : 1;
  const int64_t chunks = num_chunks(l.k);
  const int64_t chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
  const uint8_t* codes = l.codes + block * chunks * chunk_bytes(kBits);

  const X* x[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = m0 + (r < valid_rows ? r : 0);
    x[r] = static_cast<const X*>(l.prepared) + row * l.prepared_stride;
  }
  F y[kRows][kTileVecs], carry[kRows][kTileVecs], acc[kParts][kRows][kTileVecs];
  unroll<kRows>(
      [&](auto r) LOWBIT_INLINE { unroll<kTileVecs>([&](auto v) LOWBIT_INLINE { y[r][v] = carry[r][v] = zero(); }); });
  const auto clear = [&]() LOWBIT_INLINE {
    unroll<kParts>([&](auto p) LOWBIT_INLINE {
      unroll<kRows>([&](auto r)
                        LOWBIT_INLINE { unroll<kTileVecs>([&](auto v) LOWBIT_INLINE { acc[p][r][v] = zero(); }); });
    });
  };
  clear();

  int64_t group = 0, left = chunks_per_group;
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* chunk = codes + c * chunk_bytes(kBits);
    const int64_t k0 = c * kChunkK;
    const uint8_t* columns[kTileVecs];
    unroll<kTileVecs>([&](auto v) LOWBIT_INLINE {
      const int lane = lane0 + v * kVecLanes;
      columns[v] = chunk + lane / kUnitLanes * vector_bytes(kBits) + lane % kUnitLanes * 4;
      if (lane % kUnitLanes == 0) {
        unroll<kBits>([&](auto u) LOWBIT_INLINE { prefetch(columns[v] + kPrefetchBytes + u * kUnitBytes); });
      }
    });
    const auto multiply = [&](auto s, auto v, const auto& xs) LOWBIT_INLINE {
      const auto value = Compute::template value<s>(codec, columns[v]);
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        F& a = acc[s % kParts][r][v];
        a = Compute::dot(a, xs[r], value);
      });
    };
    const auto broadcast = [&](auto s, auto& xs) LOWBIT_INLINE {
      unroll<kRows>([&](auto r) LOWBIT_INLINE { xs[r] = Compute::broadcast(x[r] + k0 + s * Compute::kStepK); });
    };
    if constexpr (kRows == 1 && kBits < 8) {
      // One row is bound by memory: read the codes in the order in which they lie. Not for 8 bits, where the 32 units
      // of a chunk come out three times slower this way (2014 against 616 us for 4096 x 4096).
      unroll<kTileVecs>([&](auto v) LOWBIT_INLINE {
        unroll<kSteps>([&](auto s) LOWBIT_INLINE {
          typename Compute::Broadcast xs[kRows];
          broadcast(s, xs);
          multiply(s, v, xs);
        });
      });
    } else {
      // Several rows are bound by arithmetic: a broadcast x serves all columns and needs no place on the stack.
      unroll<kSteps>([&](auto s) LOWBIT_INLINE {
        typename Compute::Broadcast xs[kRows];
        broadcast(s, xs);
        unroll<kTileVecs>([&](auto v) LOWBIT_INLINE { multiply(s, v, xs); });
      });
    }
    const bool group_ends = --left == 0 || c + 1 == chunks;
    if (!group_ends && (c + 1) % kSumChunks != 0) continue;
    unroll<kTileVecs>([&](auto v) LOWBIT_INLINE {
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        unroll<kParts>([&](auto p) LOWBIT_INLINE { carry[r][v] = add(carry[r][v], acc[p][r][v]); });
      });
    });
    clear();
    if (!group_ends) continue;
    unroll<kTileVecs>([&](auto v) LOWBIT_INLINE {
      const GroupTerms terms = group_terms(l, block, group, lane0 + v * kVecLanes);
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const int64_t row = m0 + (r < valid_rows ? r : 0);
        const float x_sum = l.x_sums ? l.x_sums[row * l.num_groups + group] : 0.0f;
        y[r][v] = finish_group(l, terms, y[r][v], carry[r][v], x_sum);
        carry[r][v] = zero();
      });
    });
    ++group;
    left = chunks_per_group;
  }

  unroll<kRows>([&](auto r) LOWBIT_INLINE {
    if (r >= valid_rows) return;
    const int64_t n0 = block * kBlockN + lane0;
    if (n0 >= l.n) return;
    alignas(64) float row[kTileVecs * kVecLanes];
    unroll<kTileVecs>([&](auto v) LOWBIT_INLINE { store(row + v * kVecLanes, y[r][v]); });
    store_columns(l, m0 + r, n0, kTileVecs * kVecLanes, row);
  });
}

// Tasks are blocks of 64 columns; a block's codes stay in L2 while the rows pass over them four at a time.
template <class Compute>
void gemv_run(const Launch& l, int64_t begin, int64_t end) {
  const typename Compute::Codec codec(l);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t m0 = 0; m0 < l.m; m0 += 4) {
      const int rows = l.m - m0 < 4 ? static_cast<int>(l.m - m0) : 4;
      for (int lane = 0; lane < kBlockN; lane += kTileVecs * kVecLanes) {
        if (rows == 1) {
          gemv_tile<Compute, 1>(l, codec, block, m0, rows, lane);
        } else if (rows == 2) {
          gemv_tile<Compute, 2>(l, codec, block, m0, rows, lane);
        } else {
          gemv_tile<Compute, 4>(l, codec, block, m0, rows, lane);
        }
      }
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
