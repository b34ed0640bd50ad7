// GEMV with AVX2 over bytes of codes: a vector of products belongs to a few columns and has several weights of each, so
// that codes are decoded in place, 32 bytes at a time.
//
// A Table has kBits, kSums vectors of sums for 8 columns, kRowsOfTwo (rows up to which a tile has 16 columns), and:
//   at:      what it needs to know of 8 columns in a group.
//   step<i>: adds 32 products for each row; `codes` are 4 bytes of each of 8 columns, step i takes the i-th kBits of a
//            byte, x is that of a unit.
//   reduce: the sums of 8 columns.
#pragma once

#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Two floats, again and again.
inline F broadcast_pair(const float* x) {
  int64_t bits;
  __builtin_memcpy(&bits, x, 8);
  return as_float(_mm256_set1_epi64x(bits));
}

// A long group is summed in pieces, as in gemv-inl.h. One row with the cheaper table is bound by memory, and pieces of
// one chunk make its codes one stream, which comes fastest without prefetches. Lengths in halves of a chunk.
constexpr int64_t kBytesSumHalves = 16;
constexpr int64_t kBytesPrefetch = 6144;

// y of kRows rows and a block of 64 columns.
template <class Table, int kRows>
inline void bytes_tile(const Launch& l, const Table& table, int64_t block, int64_t m0) {
  constexpr int kBits = Table::kBits, kSteps = 8 / kBits, kUnitWeights = 16 / kBits * 2, kHalfUnits = kBits / 2;
  constexpr int kVecs = kRows <= Table::kRowsOfTwo ? 2 : 1;
  constexpr bool kStream = kRows == 1 && Table::kSums == 2;
  constexpr int kParts = kStream ? 2 : 1;
  constexpr int64_t kPiece = kStream ? 2 : kBytesSumHalves;
  const int64_t chunks = num_chunks(l.k);
  const int64_t per_group = l.num_groups == 1 ? 2 * chunks : l.group / kHalfChunk;
  const int64_t halves = per_group == 1 ? l.num_groups : 2 * chunks;
  const uint8_t* block_codes = l.codes + block * chunks * chunk_bytes(kBits);

  alignas(64) float y[kRows][kBlockN] = {}, total[kRows][kBlockN];
  int64_t h = 0;
  for (int64_t group = 0; h < halves; ++group) {
    const int64_t group_end = h + per_group < halves ? h + per_group : halves;
    for (bool first = true; h < group_end; first = false) {
      const int64_t piece_end = h + kPiece < group_end ? h + kPiece : group_end;
      for (int lane = 0; lane < kBlockN; lane += kVecs * kVecLanes) {
        F acc[kVecs][kParts][kRows][Table::kSums];
        const auto each = [&](const auto& fn) LOWBIT_INLINE {
          unroll<kVecs>([&](auto v) LOWBIT_INLINE {
            unroll<kRows>([&](auto r)
                              LOWBIT_INLINE { unroll<Table::kSums>([&](auto s) LOWBIT_INLINE { fn(v, r, s); }); });
          });
        };
        each([&](auto v, auto r, auto s)
                 LOWBIT_INLINE { unroll<kParts>([&](auto p) LOWBIT_INLINE { acc[v][p][r][s] = zero(); }); });
        const uint8_t* codes = block_codes + h / 2 * chunk_bytes(kBits) + h % 2 * kHalfUnits * kUnitBytes +
                               lane / kUnitLanes * vector_bytes(kBits) + lane % kUnitLanes * 4;
        const float* x[kRows];
        for (int r = 0; r < kRows; ++r) {
          x[r] = static_cast<const float*>(l.prepared) + (m0 + r) * l.prepared_stride + h * kHalfChunk;
        }
        decltype(table.at(l, 0, 0, 0)) of_group[kVecs];
        for (int v = 0; v < kVecs; ++v) of_group[v] = table.at(l, block, group, lane + v * kVecLanes);
        for (int64_t half = h; half < piece_end; ++half) {
          unroll<kHalfUnits>([&](auto u) LOWBIT_INLINE {
            if (!kStream && lane % kUnitLanes == 0) prefetch(codes + kBytesPrefetch + u * kUnitBytes);
            const auto at = [&](auto v) LOWBIT_INLINE { return load_i(codes + u * kUnitBytes + v * kVecLanes * 4); };
            unroll<kSteps>([&](auto i) LOWBIT_INLINE {
              unroll<kVecs>([&](auto v) LOWBIT_INLINE { table.template step<i>(at(v), of_group[v], x, acc[v]); });
            });
            for (int r = 0; r < kRows; ++r) x[r] += kUnitWeights;
          });
          codes += kHalfUnits * kUnitBytes + half % 2 * (chunk_bytes(kBits) - vector_bytes(kBits));
        }
        unroll<kVecs>([&](auto v) LOWBIT_INLINE {
          unroll<kRows>([&](auto r) LOWBIT_INLINE {
            F sums[Table::kSums];
            unroll<Table::kSums>([&](auto s) LOWBIT_INLINE {
              sums[s] = acc[v][0][r][s];
              if constexpr (kParts == 2) sums[s] = add(sums[s], acc[v][1][r][s]);
            });
            const F sum = Table::reduce(sums);
            float* t = total[r] + lane + v * kVecLanes;
            store(t, first ? sum : add(load(t), sum));
          });
        });
      }
      h = piece_end;
    }
    for (int lane = 0; lane < kBlockN; lane += kVecLanes) {
      const GroupTerms terms = group_terms(l, block, group, lane);
      for (int r = 0; r < kRows; ++r) {
        const float x_sum = l.x_sums ? l.x_sums[(m0 + r) * l.num_groups + group] : 0.0f;
        store(y[r] + lane, finish_group(l, terms, load(y[r] + lane), load(total[r] + lane), x_sum));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) store_columns(l, m0 + r, block * kBlockN, kBlockN, y[r]);
}

// Tasks are blocks of 64 columns.
template <class Table>
void bytes_run(const Launch& l, int64_t begin, int64_t end) {
  const Table table(l);
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 2 <= l.m; m += 2) bytes_tile<Table, 2>(l, table, block, m);
    if (m < l.m) bytes_tile<Table, 1>(l, table, block, m);
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
