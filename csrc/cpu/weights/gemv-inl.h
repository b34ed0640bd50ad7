// GEMV and skinny products: y(m, 64 columns) over the whole K, codes read once and decoded in registers. Groups are
// multiples of kChunkK, or half of it. A group's products are summed apart and scaled once.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// A long group is summed in pieces of 256 weights: one long chain of additions would round worse than a dense product.
constexpr int64_t kSumChunks = 8;

// What a codec knows of kVecs vectors of columns in a group.
template <class C, int kVecs>
struct OfGroup {
  decltype(std::declval<const C&>().at(0, 0, 0)) at[kVecs];
};
template <class C, int... V>
LOWBIT_INLINE inline OfGroup<C, sizeof...(V)> of_group(std::integer_sequence<int, V...>, const C& codec, int64_t block,
                                                       int64_t group, int lane0) {
  return {{codec.at(block, group, lane0 + V * kVecLanes)...}};
}

// The sums of a tile: kParts of them for each row and vector of columns. What handles them numbers them in a pack and
// is no closure that refers to them: compilers then hold them in registers from the start, where they would else search
// the tile for every use of a sum.
template <class Compute, int kRows, int kVecs>
struct TileSums {
  using C = typename Compute::Codec;
  using X = typename Compute::X;
  static_assert(kVecs * kVecLanes % kUnitLanes == 0);
  static constexpr int kSteps = kChunkK / Compute::kStepK, kTerms = Compute::kTerms;
  // Independent sums hide the latency of the multiply-add when few rows share a decoded value. The first half of the
  // parts has the products of the first half of a chunk.
  static constexpr int kParts = kRows == 1 ? 2 * kTerms : kRows == 2 ? 2 : 1, kOfHalf = kParts > 1 ? kParts / 2 : 1;
  // Steps that one vector of columns takes before the next. One row is bound by memory: its codes are read in the
  // order in which they lie, which for 8 bits takes a third of the time. Several rows are bound by arithmetic: a
  // broadcast x serves all columns. 8 bits: two steps share a look-up.
  static constexpr int kRun = kRows == 1 ? kSteps : C::kBits == 8 ? 2 : 1;
  static constexpr std::make_integer_sequence<int, kParts * kRows * kVecs> kAll{};
  static constexpr std::make_integer_sequence<int, kRows * kVecs> kOfPart{};

  F of[kParts][kRows][kVecs];

  template <int... I>
  LOWBIT_INLINE void clear(std::integer_sequence<int, I...>) {
    ((of[I / (kRows * kVecs)][I / kVecs % kRows][I % kVecs] = zero()), ...);
  }
  template <int kPart, int... I>
  LOWBIT_INLINE void copy_to(std::integer_sequence<int, I...>, F (&to)[kRows][kVecs]) const {
    ((to[I / kVecs][I % kVecs] = of[kPart][I / kVecs][I % kVecs]), ...);
  }
  template <int kPart, int kOther, int... I>
  LOWBIT_INLINE void add_part(std::integer_sequence<int, I...>) {
    ((of[kPart][I / kVecs][I % kVecs] = add(of[kPart][I / kVecs][I % kVecs], of[kOther][I / kVecs][I % kVecs])), ...);
  }
  // The products of `value`, of a step and vector v of columns, with x of a chunk.
  template <int kStep, int v, class Value, int... I>
  LOWBIT_INLINE void add_products(std::integer_sequence<int, I...>, const X* const (&x)[kRows], int64_t chunk,
                                  const Value& value) {
    constexpr int kFirst = kParts > 1 ? 2 * kStep / kSteps * kOfHalf : 0;
    (add_product(of[kFirst + I / kRows % kOfHalf][I % kRows][v],
                 x[I % kRows] + chunk * kChunkK * kTerms + (kStep * kTerms + I / kRows) * Compute::kStepK, value),
     ...);
  }
  template <class Value>
  LOWBIT_INLINE static void add_product(F& sum, const X* x, const Value& value) {
    sum = Compute::dot(sum, Compute::broadcast(x), value);
  }
  // Those of the kAt-th step and vector; `codes` are the codes of the first column.
  template <int kAt>
  LOWBIT_INLINE void add_step(const C& codec, const uint8_t* codes, const OfGroup<C, kVecs> (&of_halves)[2],
                              const X* const (&x)[kRows], int64_t chunk) {
    constexpr int v = kAt / kRun % kVecs, kStep = kAt / (kRun * kVecs) * kRun + kAt % kRun, kLane = v * kVecLanes;
    const uint8_t* columns = codes + kLane / kUnitLanes * vector_bytes(C::kBits) + kLane % kUnitLanes * 4;
    const auto value = Compute::template value<kStep>(codec, columns, of_halves[2 * kStep / kSteps].at[v]);
    add_products<kStep, v>(std::make_integer_sequence<int, kTerms * kRows>{}, x, chunk, value);
  }
};

// Sums over the chunks [c, end) of a group. Where the halves of a chunk are groups, `of_half` gets theirs. At numbers
// the products of half a chunk.
template <class Compute, int kRows, int kVecs, int... At>
LOWBIT_INLINE inline void sum_chunks(std::integer_sequence<int, At...>, const Launch& l,
                                     const typename Compute::Codec& codec, int64_t block, int64_t group, int lane0,
                                     const uint8_t* codes, const typename Compute::X* const (&x)[kRows], int64_t c,
                                     int64_t end, bool halves, bool fetches, F (&sums)[kRows][kVecs],
                                     F (&of_half)[2][kRows][kVecs]) {
  using Sums = TileSums<Compute, kRows, kVecs>;
  constexpr int kBits = Compute::Codec::kBits, kHalf = sizeof...(At);
  constexpr std::make_integer_sequence<int, kVecs> kColumns;
  Sums acc;
  acc.clear(Sums::kAll);
  for (; c < end; ++c) {
    OfGroup<typename Compute::Codec, kVecs> of_halves[2];
    const int64_t at = halves ? 2 * c : group;
    of_halves[0] = of_group(kColumns, codec, block, at, lane0);
    of_halves[1] = halves && at + 1 < l.num_groups ? of_group(kColumns, codec, block, at + 1, lane0) : of_halves[0];
    const uint8_t* chunk = codes + c * chunk_bytes(kBits);
    const uint8_t* columns = chunk + lane0 / kUnitLanes * vector_bytes(kBits);
    if (fetches) prefetch_chunk<kBits>(chunk);
    (acc.template add_step<At>(codec, columns, of_halves, x, c), ...);
    if constexpr (Sums::kParts == 1) {
      if (halves) {
        acc.template copy_to<0>(Sums::kOfPart, of_half[0]);
        acc.clear(Sums::kOfPart);
      }
    }
    (acc.template add_step<kHalf + At>(codec, columns, of_halves, x, c), ...);
  }
  static_assert(Sums::kOfHalf <= 2);
  if constexpr (Sums::kOfHalf == 2) {
    acc.template add_part<0, 1>(Sums::kOfPart);
    acc.template add_part<2, 3>(Sums::kOfPart);
  }
  if constexpr (Sums::kParts > 1) {
    if (halves) {
      acc.template copy_to<0>(Sums::kOfPart, of_half[0]);
      acc.template copy_to<Sums::kOfHalf>(Sums::kOfPart, of_half[1]);
    }
    acc.template add_part<0, Sums::kOfHalf>(Sums::kOfPart);
  } else if (halves) {
    acc.template copy_to<0>(Sums::kOfPart, of_half[1]);
  }
  acc.template copy_to<0>(Sums::kOfPart, sums);
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
  constexpr std::make_integer_sequence<int, kChunkK / Compute::kStepK * kVecs / 2> kHalfProducts;
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
      F sums[kRows][kVecs];
      sum_chunks<Compute, kRows, kVecs>(kHalfProducts, l, codec, block, group, lane0, codes, x, c, piece_end, halves,
                                        fetches, sums, of_half);
      c = piece_end;
      if (halves) break;
      each([&](auto r, auto v) LOWBIT_INLINE { total[r][v] = first ? sums[r][v] : add(total[r][v], sums[r][v]); });
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
