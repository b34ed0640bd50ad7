// 4-bit GEMV with AVX2: vpshufb looks 32 codes up at a time, one byte of the entries, and unpacking joins the bytes.
// vpermps looks up 8 codes among 8 entries.
// Instructions for 64 weights (32 bytes of codes) and one row of x: 32 for entries that are exact in bf16, 38 for any
// other, against 56 with vpermps.
//
// Byte i of a column's dword holds, for i = 0, 1, 2, 3, weights 0, 4, 1, 5 of 8 in its low half and 2, 6, 3, 7 in its
// high half, so a vector of products belongs to a few columns and has several weights of each.
#pragma once

#include "cpu/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kNibbleBits = 4;
constexpr int kUnitWeights = 16 / kNibbleBits * 2;  // of a column in a unit

// Byte `byte` of each of 16 entries, for both halves of a vector.
inline I byte_plane(const float* table, int byte) {
  alignas(16) uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(bytes + i, reinterpret_cast<const char*>(table + i) + byte, 1);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Tables have kSums vectors of sums for 8 columns, and:
//   step: adds 32 products for each row; `index` holds 32 codes, `half` says which of the bytes, x is that of a unit.
//   reduce: the sums of 8 columns.
// Entries with no more than a bf16's bits. Two weights of a column stand in a dword: the first is shifted up.
struct NibbleBf16 {
  static constexpr int kSums = 2;
  static constexpr int kRowsOfTwo = 2;  // rows up to which a tile has 16 columns
  I low, high;
  explicit NibbleBf16(const Launch& l) : low(byte_plane(l.table, 2)), high(byte_plane(l.table, 3)) {}
  static F pair(const float* x) {
    int64_t bits;
    __builtin_memcpy(&bits, x, 8);
    return as_float(_mm256_set1_epi64x(bits));
  }
  template <int kHalf, int kRows, int kParts>
  LOWBIT_INLINE void step(I index, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    const I l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    unroll<kSums>([&](auto s) LOWBIT_INLINE {
      const I words = s == 0 ? _mm256_unpacklo_epi8(l, h) : _mm256_unpackhi_epi8(l, h);
      const F first = as_float(shift_left<16>(words));
      const F second = as_float(bit_and(words, set1_i(static_cast<int32_t>(0xFFFF0000))));
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const float* at = x[r] + 2 * kHalf;
        acc[0][r][s] = fma(first, pair(at), acc[0][r][s]);
        acc[kParts - 1][r][s] = fma(second, pair(at + 4), acc[kParts - 1][r][s]);
      });
    });
  }
  static F reduce(const F (&sums)[kSums]) { return _mm256_hadd_ps(sums[0], sums[1]); }
};

// Any entries; x is in the order of the bytes (prepare_nibbles).
struct NibbleF32 {
  static constexpr int kSums = 4;
  static constexpr int kRowsOfTwo = 1;
  I bytes[4];
  explicit NibbleF32(const Launch& l)
      : bytes{byte_plane(l.table, 0), byte_plane(l.table, 1), byte_plane(l.table, 2), byte_plane(l.table, 3)} {}
  template <int kHalf, int kRows, int kParts>
  LOWBIT_INLINE void step(I index, const float* const* x, F (&acc)[kParts][kRows][kSums]) const {
    I b[4];
    unroll<4>([&](auto i) LOWBIT_INLINE { b[i] = _mm256_shuffle_epi8(bytes[i], index); });
    unroll<2>([&](auto s) LOWBIT_INLINE {
      const I low = s == 0 ? _mm256_unpacklo_epi8(b[0], b[1]) : _mm256_unpackhi_epi8(b[0], b[1]);
      const I high = s == 0 ? _mm256_unpacklo_epi8(b[2], b[3]) : _mm256_unpackhi_epi8(b[2], b[3]);
      const F first = as_float(_mm256_unpacklo_epi16(low, high)), second = as_float(_mm256_unpackhi_epi16(low, high));
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const F xr = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x[r] + 4 * kHalf));
        acc[0][r][2 * s] = fma(first, xr, acc[0][r][2 * s]);
        acc[0][r][2 * s + 1] = fma(second, xr, acc[0][r][2 * s + 1]);
      });
    });
  }
  static F reduce(const F (&sums)[kSums]) {
    return _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  }
};

// Rows [begin, end) of x as fp32, zero beyond k, each 8 in the order of the bytes.
inline void prepare_nibbles(const Launch& l, int64_t begin, int64_t end) {
  prepare_f32(l, begin, end);
  const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t m = begin; m < end; ++m) {
    float* row = static_cast<float*>(l.prepared) + m * l.prepared_stride;
    for (int64_t i = 0; i < l.prepared_stride; i += 8) store(row + i, _mm256_permutevar8x32_ps(load(row + i), order));
  }
}

// A long group is summed in pieces, as in gemv-inl.h. One row with the cheaper table is bound by memory, and pieces of
// one chunk make its codes one stream, which comes fastest without prefetches.
constexpr int64_t kNibbleSumChunks = 8;
constexpr int64_t kNibblePrefetchBytes = 6144;

// y of kRows rows and a block of 64 columns.
template <class Table, int kRows>
inline void nibble_tile(const Launch& l, const Table& table, int64_t block, int64_t m0) {
  constexpr int kVecs = kRows <= Table::kRowsOfTwo ? 2 : 1;
  constexpr bool kStream = kRows == 1 && Table::kSums == 2;
  constexpr int kParts = kStream ? 2 : 1;
  constexpr int64_t kPiece = kStream ? 1 : kNibbleSumChunks;
  const int64_t chunks = num_chunks(l.k);
  const int64_t chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
  const uint8_t* block_codes = l.codes + block * chunks * chunk_bytes(kNibbleBits);
  const I mask = _mm256_set1_epi8(15);

  alignas(64) float y[kRows][kBlockN] = {}, total[kRows][kBlockN];
  int64_t c = 0;
  for (int64_t group = 0; c < chunks; ++group) {
    const int64_t group_end = c + chunks_per_group < chunks ? c + chunks_per_group : chunks;
    for (bool first = true; c < group_end; first = false) {
      const int64_t piece_end = c + kPiece < group_end ? c + kPiece : group_end;
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
        const uint8_t* codes = block_codes + c * chunk_bytes(kNibbleBits) +
                               lane / kUnitLanes * vector_bytes(kNibbleBits) + lane % kUnitLanes * 4;
        const float* x[kRows];
        for (int r = 0; r < kRows; ++r) {
          x[r] = static_cast<const float*>(l.prepared) + (m0 + r) * l.prepared_stride + c * kChunkK;
        }
        for (int64_t i = c; i < piece_end; ++i) {
          unroll<kNibbleBits>([&](auto u) LOWBIT_INLINE {
            if (!kStream && lane % kUnitLanes == 0) prefetch(codes + kNibblePrefetchBytes + u * kUnitBytes);
            const auto at = [&](auto v) LOWBIT_INLINE { return load_i(codes + u * kUnitBytes + v * kVecLanes * 4); };
            unroll<kVecs>([&](auto v) LOWBIT_INLINE { table.template step<0>(bit_and(at(v), mask), x, acc[v]); });
            unroll<kVecs>(
                [&](auto v) LOWBIT_INLINE { table.template step<1>(bit_and(shift_right<4>(at(v)), mask), x, acc[v]); });
            for (int r = 0; r < kRows; ++r) x[r] += kUnitWeights;
          });
          codes += chunk_bytes(kNibbleBits);
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
      c = piece_end;
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
void nibbles_run(const Launch& l, int64_t begin, int64_t end) {
  const Table table(l);
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 2 <= l.m; m += 2) nibble_tile<Table, 2>(l, table, block, m);
    if (m < l.m) nibble_tile<Table, 1>(l, table, block, m);
  }
}

constexpr Kernel nibbles(const char* name, Cost cost) {
  return {name,
          Op::kLinear,
          Dtype::kF32,
          Codec::kLut,
          kNibbleBits,
          Scope::kShared,
          LOWBIT_ISA_BIT,
          true,
          {true, true, true, false},
          cost,
          prepare_nibbles,
          0,
          nibbles_run<NibbleF32>};
}
constexpr Kernel nibbles_bf16(const char* name, Cost cost) {
  Kernel row = nibbles(name, cost);
  row.prepare = prepare_f32;
  row.run = nibbles_run<NibbleBf16>;
  row.bf16_table = true;
  return row;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
