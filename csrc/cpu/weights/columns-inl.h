// Products with a table per column (and possibly per group) in bf16. A register table serves one column, so K must be
// in the lanes: 16 columns of the n16 layout are transposed a slab of K at a time, and each column then reads its own
// stream with its own table, rows of x along it. The transposition costs 4 instructions for 64 bytes of codes, a
// fourth of what one row of x needs for them, and is shared by all rows.
#pragma once

#include "cpu/weights/bf16-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// A span is what 16 dwords of a transposed column hold. Where 16 units are whole chunks, dword d is unit d; else
// dword d is a unit of chunk d, and a span has a vector for each unit of a chunk.
template <int B>
struct ColumnSpan {
  static constexpr bool kWhole = 16 % B == 0;
  static constexpr int kVecs = kWhole ? 1 : B;
  static constexpr int kChunks = kWhole ? 16 / B : 16;
  static constexpr int kWeights = kChunks * kChunkK;
  static constexpr int kSteps = kWeights / 32;
  static constexpr int kDwordStride = kWeights / 16;  // weights from a dword to the next
};
constexpr int kSlabVecs = 16;  // vectors of a column between two transpositions: 16 columns of them are 16 KiB

// Rows [begin, end) of x: [span][step][dword][2], zero beyond k.
template <int B>
void prepare_columns(const Launch& l, int64_t begin, int64_t end) {
  using S = ColumnSpan<B>;
  for (int64_t m = begin; m < end; ++m) {
    const uint16_t* x = static_cast<const uint16_t*>(l.x) + m * l.x_stride;
    uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * l.prepared_stride;
    for (int64_t k0 = 0; k0 < l.prepared_stride; k0 += S::kWeights) {
      for (int step = 0; step < S::kSteps; ++step) {
        for (int d = 0; d < 16; ++d, out += 2) {
          const int64_t k = k0 + d * S::kDwordStride + 2 * step;
          out[0] = k < l.k ? x[k] : uint16_t{0};
          out[1] = k + 1 < l.k ? x[k + 1] : uint16_t{0};
        }
      }
    }
  }
}

// rows[i] becomes the i-th dwords of all rows.
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  unroll<8>([&](auto i) LOWBIT_INLINE {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  // rows[4 q + c] now gets dwords c, c + 4, c + 8, c + 12 of rows 4 q .. 4 q + 3, one in each 128-bit lane.
  unroll<4>([&](auto q) LOWBIT_INLINE {
    rows[4 * q] = _mm512_unpacklo_epi64(t[4 * q], t[4 * q + 2]);
    rows[4 * q + 1] = _mm512_unpackhi_epi64(t[4 * q], t[4 * q + 2]);
    rows[4 * q + 2] = _mm512_unpacklo_epi64(t[4 * q + 1], t[4 * q + 3]);
    rows[4 * q + 3] = _mm512_unpackhi_epi64(t[4 * q + 1], t[4 * q + 3]);
  });
  __m512i out[16];
  unroll<4>([&](auto c) LOWBIT_INLINE {
    const __m512i even_low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xDD);
    out[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    out[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
    out[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    out[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
  });
  unroll<16>([&](auto i) LOWBIT_INLINE { rows[i] = out[i]; });
}

// The codes of a vector of 16 columns.
template <int B>
inline const uint8_t* column_codes(const Launch& l, int64_t block, int64_t vector) {
  return l.codes + block * num_chunks(l.k) * chunk_bytes(B) + vector * vector_bytes(B);
}

// Spans [begin, end) of 16 columns: slab[column][span][vector][64 bytes], columns kSlabVecs vectors apart.
template <int B>
inline void transpose_slab(const Launch& l, int64_t block, int vector, int64_t begin, int64_t end, uint8_t* slab) {
  using S = ColumnSpan<B>;
  const int64_t chunks = num_chunks(l.k);
  const uint8_t* codes = column_codes<B>(l, block, vector);
  for (int64_t span = begin; span < end; ++span) {
    for (int vec = 0; vec < S::kVecs; ++vec) {
      __m512i rows[16];
      unroll<16>([&](auto d) LOWBIT_INLINE {
        const int64_t chunk = span * S::kChunks + (S::kWhole ? d / B : d);
        const int unit = S::kWhole ? d % B : vec;
        const uint8_t* at = codes + chunk * chunk_bytes(B) + unit * kUnitBytes;
        rows[d] = chunk < chunks ? load_i(at) : _mm512_setzero_si512();
      });
      transpose(rows);
      unroll<16>([&](auto c) LOWBIT_INLINE {
        const int64_t to = c * kSlabVecs + (span - begin) * S::kVecs + vec;
        _mm512_store_si512(slab + to * kUnitBytes, rows[c]);
      });
    }
  }
}

// The tables of 16 columns.
template <int B>
struct ColumnTables {
  static constexpr int kEntries = B < 4 ? 16 : 1 << B;  // a table of fewer is repeated
  WordTable<B> of[16];
  void read(const Launch& l, int64_t block, int vector, int64_t group) {
    const int64_t g = l.table_groups == 1 ? 0 : group;
    alignas(64) float entries[16][kEntries];
    const float* table = l.table + ((block * l.table_groups + g) << B) * kBlockN + vector * kUnitLanes;
    for (int e0 = 0; e0 < kEntries; e0 += 16) {
      __m512i rows[16];
      unroll<16>([&](auto e) LOWBIT_INLINE { rows[e] = load_i(table + ((e0 + e) & ((1 << B) - 1)) * kBlockN); });
      transpose(rows);
      unroll<16>([&](auto c) LOWBIT_INLINE { _mm512_store_si512(&entries[c][e0], rows[c]); });
    }
    for (int c = 0; c < 16; ++c) of[c] = WordTable<B>(entries[c]);
  }
};

// Where a slab of 16 columns stands.
struct Slab {
  int64_t block, begin, end, spans_per_group;  // in spans
  int vector;
  const uint8_t* data;
  int64_t group;                                    // of the first span
  alignas(64) float scales[kSlabVecs][kUnitLanes];  // of each group that the slab meets
  const uint8_t* next;                              // what is to be fetched meanwhile
  int64_t next_lines;
};

// Fetches the part [begin, end) of `all` of what comes next into L2: else a transposition waits for memory, and memory
// for the products.
LOWBIT_INLINE inline void prefetch_next(const Slab& slab, int64_t begin, int64_t end, int64_t all) {
  for (int64_t i = slab.next_lines * begin / all; i < slab.next_lines * end / all; ++i) {
    _mm_prefetch((const char*)slab.next + i * kUnitBytes, _MM_HINT_T1);
  }
}

// Adds the products of `value` and a step of each row of x; a pack, as in gemv-inl.h.
template <int... R>
LOWBIT_INLINE inline void add_rows(std::integer_sequence<int, R...>, F (&acc)[sizeof...(R)], const uint16_t* x,
                                   int64_t stride, int at, __m512i value) {
  ((acc[R] = ComputeBf16<1>::dot(acc[R], load_i(x + R * stride + at), value)), ...);
}

// y[row][16] += the products of kColumns columns with kRows rows over a slab.
template <int B, int kRows, int kColumns>
inline void multiply_columns(const Launch& l, const Slab& slab, const ColumnTables<B>& tables, int64_t m0, int column,
                             float* y) {
  using S = ColumnSpan<B>;
  constexpr int kParts = kRows * kColumns < 8 ? 2 : 1;
  const uint16_t* x = static_cast<const uint16_t*>(l.prepared) + m0 * l.prepared_stride + slab.begin * S::kWeights;
  F sum[kColumns][kRows];
  const auto each = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kColumns>([&](auto c) LOWBIT_INLINE { unroll<kRows>([&](auto r) LOWBIT_INLINE { fn(c, r); }); });
  };
  each([&](auto c, auto r) LOWBIT_INLINE { sum[c][r] = zero(); });
  int64_t group_end = (slab.group + 1) * slab.spans_per_group;
  // A loop of its own for a group: in one loop over all, the sums of the slab would take registers from those of the
  // group.
  for (int64_t span = slab.begin, group = 0; span < slab.end; ++group, group_end += slab.spans_per_group) {
    F acc[kParts][kColumns][kRows];
    each([&](auto c, auto r) LOWBIT_INLINE { unroll<kParts>([&](auto p) LOWBIT_INLINE { acc[p][c][r] = zero(); }); });
    const int64_t last = group_end < slab.end ? group_end : slab.end;
    for (; span < last; ++span, x += S::kWeights) {
      unroll<S::kSteps>([&](auto s) LOWBIT_INLINE {
        unroll<kColumns>([&](auto c) LOWBIT_INLINE {
          const uint8_t* at = slab.data + ((column + c) * kSlabVecs + (span - slab.begin) * S::kVecs) * kUnitBytes;
          const __m512i value = tables.of[column + c].template value<s>(at);
          add_rows(std::make_integer_sequence<int, kRows>{}, acc[s % kParts][c], x, l.prepared_stride, s * 32, value);
        });
      });
    }
    unroll<kColumns>([&](auto c) LOWBIT_INLINE {
      const F scale = set1(slab.scales[group][column + c]);
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        F total = acc[0][c][r];
        unroll<kParts - 1>([&](auto p) LOWBIT_INLINE { total = add(total, acc[p + 1][c][r]); });
        sum[c][r] = fma(scale, total, sum[c][r]);
      });
    });
  }
  each([&](auto c, auto r) LOWBIT_INLINE { y[r * kUnitLanes + column + c] += sum_lanes(sum[c][r]); });
}

constexpr int64_t kColumnRowsPerTask = 256;  // y of 16 columns: 16 KiB

// Scales of the groups of a slab. A function of its own: a call of it leaves the registers of the products alone.
__attribute__((noinline)) void read_scales(const Launch& l, Slab& slab) {
  slab.group = slab.begin / slab.spans_per_group;
  for (int64_t g = slab.group; g * slab.spans_per_group < slab.end; ++g) {
    store(slab.scales[g - slab.group], group_scale(l, slab.block, g, slab.vector * kUnitLanes));
  }
}

template <int B>
void columns_run(const Launch& l, int64_t begin, int64_t end) {
  using S = ColumnSpan<B>;
  alignas(64) uint8_t data[16 * kSlabVecs * kUnitBytes];
  alignas(64) float y[kColumnRowsPerTask * kUnitLanes];
  ColumnTables<B> tables;
  const int64_t row_blocks = ceil_div(l.m, kColumnRowsPerTask), spans = ceil_div(l.k, S::kWeights);
  constexpr int64_t span_lines = S::kChunks * chunk_bytes(B) / (kBlockN / kUnitLanes) / kUnitBytes;
  Slab slab{};
  slab.data = data;
  slab.spans_per_group = l.num_groups == 1 ? spans : l.group / S::kWeights;
  for (int64_t task = begin; task < end; ++task) {
    slab.block = task / row_blocks;
    // The next block is fetched in the order in which it lies; its slabs then find it in L2.
    const uint8_t* codes_end = column_codes<B>(l, slab.block + 1, 0);
    const int64_t m_begin = task % row_blocks * kColumnRowsPerTask;
    const int64_t rows = l.m - m_begin < kColumnRowsPerTask ? l.m - m_begin : kColumnRowsPerTask;
    for (slab.vector = 0; slab.vector < kBlockN / kUnitLanes; ++slab.vector) {
      const int64_t n0 = slab.block * kBlockN + slab.vector * kUnitLanes;
      if (n0 >= l.n) break;
      __builtin_memset(y, 0, rows * kUnitLanes * sizeof(float));
      for (slab.begin = 0; slab.begin < spans; slab.begin = slab.end) {
        slab.end = slab.begin + kSlabVecs / S::kVecs;
        // A table per group: a slab ends with it.
        const int64_t group_end = (slab.begin / slab.spans_per_group + 1) * slab.spans_per_group;
        if (l.table_groups > 1 && slab.end > group_end) slab.end = group_end;
        if (slab.end > spans) slab.end = spans;
        transpose_slab<B>(l, slab.block, slab.vector, slab.begin, slab.end, data);
        read_scales(l, slab);
        if (slab.begin == 0 || l.table_groups > 1) {
          tables.read(l, slab.block, slab.vector, slab.group);
        }
        slab.next = codes_end + (slab.vector * spans + slab.begin) * span_lines * kUnitBytes;
        slab.next_lines = (slab.end - slab.begin) * span_lines;
        const int64_t fours = rows / 4 * 4;
        // All columns for a tile of rows, whose part of x they find in the cache.
        for (int64_t m = 0; m < fours; m += 4) {
          prefetch_next(slab, m, m + 4, fours);
          for (int column = 0; column < kUnitLanes; column += 4) {
            multiply_columns<B, 4, 4>(l, slab, tables, m_begin + m, column, y + m * kUnitLanes);
          }
        }
        for (int column = 0; column < kUnitLanes; column += 2) {
          if (fours == 0) prefetch_next(slab, column, column + 2, kUnitLanes);
          int64_t m = fours;
          for (; m + 2 <= rows; m += 2) {
            multiply_columns<B, 2, 2>(l, slab, tables, m_begin + m, column, y + m * kUnitLanes);
          }
          if (m < rows) multiply_columns<B, 1, 2>(l, slab, tables, m_begin + m, column, y + m * kUnitLanes);
        }
      }
      for (int64_t m = 0; m < rows; ++m) store_columns(l, m_begin + m, n0, kUnitLanes, y + m * kUnitLanes);
    }
  }
}

template <int B>
constexpr Kernel columns_bf16(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kBf16,
          .codec = Codec::kLut,
          .bits = B,
          .scope = Scope::kColumn,
          .isa = kAvx512Bf16,
          .chunk_groups = true,
          .exact_x = {.bf16 = true},
          .prepare = prepare_columns<B>,
          .rows_per_task = kColumnRowsPerTask,
          .run = columns_run<B>,
          .span = ColumnSpan<B>::kWeights};
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
