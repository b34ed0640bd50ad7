// GEMV and skinny products: y(m, 64 columns) over the whole K, codes read once and decoded in registers. Groups are
// multiples of kChunkK, or half of it. A group's products are summed apart and scaled once.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// A long group is summed in pieces of 256 weights: one long chain of additions would round worse than a dense product.
constexpr int64_t kSumChunks = 8;

// Adds the products of `value`, of a step and a vector of columns, and each row of x to the sums: the first half of the
// parts has those of the first half of a chunk. Products are numbered in a pack: lambdas would be a function for each
// of them in each step, all of which the compiler holds at once.
template <class Compute, int kStep, int... I, int kParts, int kRows, int kVecs, class Value>
LOWBIT_INLINE inline void add_products(std::integer_sequence<int, I...>, F (&acc)[kParts][kRows][kVecs], int v,
                                       const typename Compute::X* const (&x)[kRows], int64_t chunk,
                                       const Value& value) {
  constexpr int kTerms = Compute::kTerms, kOfHalf = kParts > 1 ? kParts / 2 : 1;
  constexpr int kFirst = kParts > 1 ? kStep / (kChunkK / Compute::kStepK / 2) * kOfHalf : 0;
  const auto add = [&](int term, F& a, const typename Compute::X* row) LOWBIT_INLINE {
    a = Compute::dot(a, Compute::broadcast(row + chunk * kChunkK * kTerms + term * Compute::kStepK), value);
  };
  (add(kStep * kTerms + I / kRows, acc[kFirst + I / kRows % kOfHalf][I % kRows][v], x[I % kRows]), ...);
}

// Adds what a chunk gives whose halves are groups. A function of its own, which all codecs share.
template <int kRows, int kVecs>
__attribute__((noinline)) void close_halves(const Launch& l, int64_t block, int64_t chunk, int lane0,
                                            const int64_t (&rows)[kRows], const F (&sums)[2][kRows][kVecs],
                                            F (&y)[kRows][kVecs]) {
  for (int half = 0; half < 2; ++half) {
    const int64_t group = 2 * chunk + half;
    if (group == l.num_groups) return;
    for (int v = 0; v < kVecs; ++v) {
      const GroupTerms terms = group_terms(l, block, group, lane0 + v * kVecLanes);
      for (int r = 0; r < kRows; ++r) {
        const float x_sum = l.x_sums ? l.x_sums[rows[r] * l.num_groups + group] : 0.0f;
        y[r][v] = finish_group(l, terms, y[r][v], sums[half][r][v], x_sum);
      }
    }
  }
}

// y of kRows rows and kVecs vectors of columns from column lane0 of a block.
template <class Compute, int kRows, int kVecs>
inline void gemv_tile(const Launch& l, const typename Compute::Codec& codec, int64_t block, int64_t m0, int valid_rows,
                      int lane0) {
  using X = typename Compute::X;
  constexpr int kBits = Compute::Codec::kBits;
  constexpr int kSteps = kChunkK / Compute::kStepK;
  constexpr int kTerms = Compute::kTerms;
  // Independent sums hide the latency of the multiply-add when few rows share a decoded value.
  constexpr int kParts = kRows == 1 ? 2 * kTerms : kRows == 2 ? 2 : 1;
  // Steps that one vector of columns takes before the next. One row is bound by memory: its codes are read in the
  // order in which they lie, which for 8 bits takes a third of the time. Several rows are bound by arithmetic: a
  // broadcast x serves all columns. 8 bits: two steps share a look-up.
  constexpr int kRun = kRows == 1 ? kSteps : kBits == 8 ? 2 : 1;
  const int64_t chunks = num_chunks(l.k);
  const bool halves = halves_chunks(l.group, l.k);
  const int64_t chunks_per_group = l.num_groups == 1 ? chunks : halves ? 1 : l.group / kChunkK;
  const uint8_t* codes = l.codes + block * chunks * chunk_bytes(kBits);

  const bool fetches = kRows > 1 && fetches_codes(chunks * chunk_bytes(kBits), m0, lane0);

  const X* x[kRows];
  int64_t rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = m0 + (r < valid_rows ? r : 0);
    x[r] = static_cast<const X*>(l.prepared) + rows[r] * l.prepared_stride;
  }
  F y[kRows][kVecs];
  const auto each = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kVecs>([&](auto v) LOWBIT_INLINE { fn(r, v); }); });
  };
  each([&](auto r, auto v) LOWBIT_INLINE { y[r][v] = zero(); });

  int64_t c = 0;
  for (int64_t group = 0; c < chunks; ++group) {
    const int64_t group_end = c + chunks_per_group < chunks ? c + chunks_per_group : chunks;
    F total[kRows][kVecs], of_half[2][kRows][kVecs];
    each([&](auto r, auto v) LOWBIT_INLINE { total[r][v] = zero(); });
    for (bool first = true; c < group_end; first = false) {
      const int64_t piece_end = c + kSumChunks < group_end ? c + kSumChunks : group_end;
      F acc[kParts][kRows][kVecs];
      unroll<kParts>([&](auto p) LOWBIT_INLINE { each([&](auto r, auto v) LOWBIT_INLINE { acc[p][r][v] = zero(); }); });
      for (; c < piece_end; ++c) {
        const uint8_t* columns[kVecs];
        decltype(codec.at(0, 0, 0)) of_group[2][kVecs];  // of each half of the chunk
        unroll<kVecs>([&](auto v) LOWBIT_INLINE {
          const int lane = lane0 + v * kVecLanes;
          const int64_t at = halves ? 2 * c : group;
          of_group[0][v] = codec.at(block, at, lane);
          of_group[1][v] = halves && at + 1 < l.num_groups ? codec.at(block, at + 1, lane) : of_group[0][v];
          columns[v] = codes + c * chunk_bytes(kBits) + lane / kUnitLanes * vector_bytes(kBits) + lane % kUnitLanes * 4;
        });
        if (fetches) prefetch_chunk<kBits>(codes + c * chunk_bytes(kBits));
        unroll<kSteps * kVecs>([&](auto at) LOWBIT_INLINE {
          constexpr int v = at / kRun % kVecs, step = at / (kRun * kVecs) * kRun + at % kRun;
          if constexpr (kParts == 1 && at * 2 == kSteps * kVecs) {
            if (halves) {
              each([&](auto r, auto u) LOWBIT_INLINE {
                of_half[0][r][u] = acc[0][r][u];
                acc[0][r][u] = zero();
              });
            }
          }
          const auto value = Compute::template value<step>(codec, columns[v], of_group[2 * step / kSteps][v]);
          add_products<Compute, step>(std::make_integer_sequence<int, kTerms * kRows>{}, acc, v, x, c, value);
        });
      }
      each([&](auto r, auto v) LOWBIT_INLINE {
        constexpr int kOfHalf = kParts > 1 ? kParts / 2 : 1;
        F sum = acc[0][r][v];
        unroll<kOfHalf - 1>([&](auto p) LOWBIT_INLINE { sum = add(sum, acc[p + 1][r][v]); });
        if constexpr (kParts > 1) {
          F second = acc[kOfHalf][r][v];
          unroll<kOfHalf - 1>([&](auto p) LOWBIT_INLINE { second = add(second, acc[kOfHalf + p + 1][r][v]); });
          if (halves) {
            of_half[0][r][v] = sum;
            of_half[1][r][v] = second;
          }
          sum = add(sum, second);
        } else if (halves) {
          of_half[1][r][v] = sum;
        }
        total[r][v] = first ? sum : add(total[r][v], sum);
      });
    }
    if (halves) {
      close_halves<kRows, kVecs>(l, block, group, lane0, rows, of_half, y);
      continue;
    }
    unroll<kVecs>([&](auto v) LOWBIT_INLINE {
      const GroupTerms terms = group_terms(l, block, group, lane0 + v * kVecLanes);
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const float x_sum = l.x_sums ? l.x_sums[rows[r] * l.num_groups + group] : 0.0f;
        y[r][v] = finish_group(l, terms, y[r][v], total[r][v], x_sum);
      });
    });
  }

  const int64_t n0 = block * kBlockN + lane0;
  if (n0 >= l.n) return;
  unroll<kRows>([&](auto r) LOWBIT_INLINE {
    if (r >= valid_rows) return;
    alignas(64) float row[kVecs * kVecLanes];
    unroll<kVecs>([&](auto v) LOWBIT_INLINE { store(row + v * kVecLanes, y[r][v]); });
    store_columns(l, rows[r], n0, kVecs * kVecLanes, row);
  });
}

template <class Compute, int kRows, int kVecs>
inline void gemv_columns(const Launch& l, const typename Compute::Codec& codec, int64_t block, int64_t m0, int rows) {
  for (int lane = 0; lane < kBlockN; lane += kVecs * kVecLanes) {
    gemv_tile<Compute, kRows, kVecs>(l, codec, block, m0, rows, lane);
  }
}

// Tasks are blocks of 64 columns; a block's codes stay in L2 while the rows pass over them, as many at a time as the
// registers hold sums for. The first rows take all columns at once: memory is then read in order, which a tile of half
// the columns does at a third of the speed.
template <class Compute>
void gemv_run(const Launch& l, int64_t begin, int64_t end) {
  const typename Compute::Codec codec(l);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t m0 = 0; m0 < l.m;) {
      const int left = l.m - m0 < kTileRows ? static_cast<int>(l.m - m0) : kTileRows;
      if (left == 1) {
        gemv_columns<Compute, 1, kTileVecs>(l, codec, block, m0, 1);
        m0 += 1;
        continue;
      }
      if (left == 2) {
        gemv_columns<Compute, 2, kTileVecs>(l, codec, block, m0, 2);
        m0 += 2;
        continue;
      }
      if constexpr (kTileRows > 4 && Compute::kTerms == 1) {
        if (m0 > 0 && left > 6) {
          gemv_columns<Compute, kTileRows, kTileVecs / 2>(l, codec, block, m0, left);
          m0 += left;
          continue;
        }
      }
      const int rows = left < 4 ? left : 4;
      gemv_columns<Compute, 4, kTileVecs>(l, codec, block, m0, rows);
      m0 += rows;
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
