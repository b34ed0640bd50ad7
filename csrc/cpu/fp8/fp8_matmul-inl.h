// FP8 products of one instruction set, over a policy P that says what codes are decoded to (fp8_mm_f32-inl.h,
// fp8_mm_bf16-inl.h). b is (n, k) row by row, as given. A family picks the policy of an FP8 type.
//
// Few rows (fp8_few_run): K in the lanes. b is decoded in registers and read once, row after row, so that memory is
// read in order; lanes are added at the end. Many rows (fp8_many_run): 128 x kColumns values of b are decoded into a
// panel in L1, columns in the lanes, and meet every row of a task.
//
// P has Element and prepare_lanes / decode / dot for K in the lanes (kStep values at a time, and kChains sums that a
// tile shares out), decode_panel / broadcast / dot_columns for columns in the lanes (kPair values of a column in a
// lane), and `scales`, those of kStep values in the lanes.
#pragma once

#include "cpu/fp8/fp8-inl.h"
#include "cpu/fp8/fp8_matmul.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int64_t kFp8Slab = 128;      // no group is longer
constexpr int64_t kFp8LongSlab = 192;  // without groups
// A sum that no scale ends is taken in pieces: one long chain of additions would wait for each, and round worse.
constexpr int64_t kFp8Piece = 256;

inline bool by_group(const Fp8Scales& s) { return s.k_shift != kWholeRow; }
inline float scale_of(const Fp8Scales& s, int64_t row, int64_t k) {
  const int64_t i = (row >> s.row_shift) * s.stride + (k >> s.k_shift);
  return load_scale(s.values, s.type, i);
}
// Logarithm of the number of values along K that share both scales; large without groups.
inline int shift_of(const Fp8Matmul& q) {
  const int shift = q.a.scales.k_shift < q.b.scales.k_shift ? q.a.scales.k_shift : q.b.scales.k_shift;
  return shift == kWholeRow ? 62 : shift;
}

// The scales that stand for whole rows, one for each column of a task, and 1 beyond n.
inline void column_scales(const Fp8Matmul& q, int64_t n0, int64_t count, bool wanted, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = wanted && n0 + j < q.out.n ? scale_of(q.b.scales, n0 + j, 0) : 1.0f;
}
inline void store_scaled(const Fp8Matmul& q, int64_t row, int64_t n0, int64_t count, float a_scale,
                         const float* b_scales, float* y) {
  const F sa = set1(a_scale);
  for (int64_t j = 0; j < count; j += kVecLanes) store(y + j, mul(mul(load(y + j), sa), load(b_scales + j)));
  store_columns(q.out, row, n0, count, y);
}

// Where the operands of the first kRows rows and kCols columns from n0 lie; indices beyond the last repeat it.
template <class P, int kRows, int kCols>
struct FewTile {
  int64_t rows[kRows], columns[kCols];
  const typename P::Element* a[kRows];
  const uint8_t* b[kCols];
  FewTile(const Fp8Matmul& q, int64_t n0) {
    const int64_t stride = ceil_div(q.out.k, kFp8PadK) * kFp8PadK;
    for (int r = 0; r < kRows; ++r) {
      rows[r] = r < q.out.m ? r : q.out.m - 1;
      a[r] = static_cast<const typename P::Element*>(q.prepared) + rows[r] * stride;
    }
    for (int c = 0; c < kCols; ++c) {
      columns[c] = n0 + c < q.out.n ? n0 + c : q.out.n - 1;
      b[c] = q.b.codes + columns[c] * q.b.stride;
    }
  }
};
template <int kRows, int kCols>
LOWBIT_INLINE inline void store_sums(const F (*total)[kCols], int64_t n0, float (*y)[kFp8FewRowsColumns]) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) y[r][n0 % kFp8FewRowsColumns + c] = sum(total[r][c]);
  }
}

// y[row][column] of a tile.
template <class P, int kRows, int kCols>
inline void few_tile(const Fp8Matmul& q, const P& p, int64_t n0, float (*y)[kFp8FewRowsColumns]) {
  constexpr int kStep = P::kStep, kChains = P::kChains > kRows * kCols ? P::kChains / (kRows * kCols) : 1;
  const FewTile<P, kRows, kCols> at(q, n0);
  const int64_t k_size = q.out.k;
  const bool scaled = by_group(q.a.scales) || by_group(q.b.scales);
  const int64_t group = int64_t{1} << shift_of(q), span = !scaled ? kFp8Piece : group < kStep ? kStep : group;
  F total[kRows][kCols];
  const auto each = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kCols>([&](auto c) LOWBIT_INLINE { fn(r, c); }); });
  };
  each([&](auto r, auto c) LOWBIT_INLINE { total[r][c] = zero(); });
  for (int64_t k = 0; k < k_size;) {
    const int64_t first = k, end = k + span < k_size ? k + span : k_size;
    F acc[kRows][kCols][kChains];
    each([&](auto r, auto c) LOWBIT_INLINE { unroll<kChains>([&](auto i) LOWBIT_INLINE { acc[r][c][i] = zero(); }); });
    const auto multiply = [&](const uint8_t* codes, auto c) LOWBIT_INLINE {
      const auto w = p.decode(codes);
      unroll<kRows>([&](auto r) LOWBIT_INLINE { P::template dot<kChains>(acc[r][c], at.a[r] + k, w); });
    };
    for (; k + kStep <= end; k += kStep) {
      unroll<kCols>([&](auto c) LOWBIT_INLINE {
        P::fetch(at.b[c] + k);
        multiply(at.b[c] + k, c);
      });
    }
    if (k < end) {
      unroll<kCols>([&](auto c) LOWBIT_INLINE {
        alignas(64) uint8_t last[kStep] = {};
        __builtin_memcpy(last, at.b[c] + k, end - k);
        multiply(last, c);
      });
      k = end;
    }
    each([&](auto r, auto c) LOWBIT_INLINE {
      unroll<kChains - 1>([&](auto i) LOWBIT_INLINE { acc[r][c][0] = add(acc[r][c][0], acc[r][c][i + 1]); });
    });
    if (!scaled) {
      each([&](auto r, auto c) LOWBIT_INLINE { total[r][c] = add(total[r][c], acc[r][c][0]); });
      continue;
    }
    F sb[kCols];
    unroll<kCols>([&](auto c) LOWBIT_INLINE { sb[c] = p.scales(q.b.scales, at.columns[c], first, k_size); });
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      const F sa = p.scales(q.a.scales, at.rows[r], first, k_size);
      unroll<kCols>([&](auto c) LOWBIT_INLINE { total[r][c] = fma(mul(acc[r][c][0], sa), sb[c], total[r][c]); });
    });
  }
  store_sums<kRows, kCols>(total, n0, y);
}

// Groups so short that their scales take longer to find than to multiply by.
template <class P>
inline bool short_groups(const Fp8Matmul& q) {
  return P::kShortTiles && shift_of(q) <= 5;
}

// Tasks are blocks of kFp8FewRowsColumns columns.
template <class P>
void fp8_few_run(const Fp8Matmul& q, const P& p, int64_t begin, int64_t end) {
  const bool scaled = by_group(q.a.scales) || by_group(q.b.scales);
  alignas(64) float y[kFp8FewRows][kFp8FewRowsColumns], b_scales[kFp8FewRowsColumns];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n0 = task * kFp8FewRowsColumns, left = q.out.n - n0;
    const int64_t n_end = n0 + (left < kFp8FewRowsColumns ? left : kFp8FewRowsColumns);
    __builtin_memset(y, 0, sizeof y);
    const auto tiles = [&](auto rows, auto columns) LOWBIT_INLINE {
      for (int64_t n = n0; n < n_end; n += columns) {
        if constexpr (P::kShortTiles) {
          if (short_groups<P>(q)) {
            P::template short_tile<rows, columns>(q, n, y);
            continue;
          }
        }
        few_tile<P, rows, columns>(q, p, n, y);
      }
    };
    if (q.out.m == 1) {
      tiles(std::integral_constant<int, 1>(), std::integral_constant<int, 1>());
    } else if (q.out.m == 2) {
      tiles(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
    } else {
      tiles(std::integral_constant<int, 4>(), std::integral_constant<int, 2>());
    }
    column_scales(q, n0, kFp8FewRowsColumns, !scaled, b_scales);
    for (int64_t r = 0; r < q.out.m; ++r) {
      const float a_scale = scaled ? 1.0f : scale_of(q.a.scales, r, 0);
      store_scaled(q, r, n0, kFp8FewRowsColumns, a_scale, b_scales, y[r]);
    }
  }
}

// A panel: `k_size` values of K, as many as are there, of kColumns columns, and their scales by group, [group][column].
// What is decoded goes on with zeros up to whole chunks, but no group begins there, so no scale is asked for.
struct Fp8Panel {
  int64_t slab, k0, k_size, n0, first_row;
  int group_shift;
  const float* scales;
};

// Adds the products of kRows rows from first_row + row with a panel to y (rows, kColumns). kHeld: y stays in registers
// between the groups of a panel.
template <class P, int kRows, bool kHeld>
inline void many_tile(const Fp8Matmul& q, const Fp8Panel& panel, const typename P::Element* w_panel, int64_t row,
                      float* y_rows) {
  using Element = typename P::Element;
  constexpr int kVecs = P::kVecs, kPair = P::kPair;
  const int64_t m = q.out.m, group = int64_t{1} << panel.group_shift;
  const int64_t part = group < kChunkK ? group : kChunkK;
  const Element* a =
      static_cast<const Element*>(q.prepared) + (panel.k0 / kChunkK * m + panel.first_row + row) * kChunkK;
  const bool a_groups = by_group(q.a.scales), b_groups = by_group(q.b.scales);
  F acc[kRows][kVecs], total[kRows][kVecs];
  const auto each = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kVecs>([&](auto v) LOWBIT_INLINE { fn(r, v); }); });
  };
  const auto y_at = [&](auto r, auto v) LOWBIT_INLINE { return y_rows + r * P::kColumns + v * kVecLanes; };
  each([&](auto r, auto v) LOWBIT_INLINE {
    acc[r][v] = zero();
    if constexpr (kHeld) total[r][v] = load(y_at(r, v));
  });
  for (int64_t k = 0; k < panel.k_size;) {
    const Element* x = a + k / kChunkK * m * kChunkK + k % kChunkK;
    // The rows of the next tile, as a of many rows does not fit in L2, and the sums of this one.
    const float* sums = y_rows + k / kChunkK % kVecs * kVecLanes;
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      prefetch(x + (kRows + r) * kChunkK);
      prefetch(sums + r * P::kColumns);
    });
    for (int64_t i = 0; i < part; i += kPair) {
      typename P::Pairs w[kVecs];
      unroll<kVecs>([&](auto v) LOWBIT_INLINE { w[v] = P::load_pairs(w_panel + v * kVecLanes * kPair); });
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        const auto xt = P::broadcast(x + r * kChunkK + i);
        unroll<kVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = P::dot_columns(acc[r][v], xt, w[v]); });
      });
      w_panel += P::kColumns * kPair;
    }
    k += part;
    if ((k & (group - 1)) != 0 && k < panel.k_size) continue;
    const int64_t at = panel.k0 + k - part;
    const float* sa = a_groups ? q.a_scales + (at >> q.a.scales.k_shift) * m + panel.first_row + row : nullptr;
    const float* sb = panel.scales + ((k - part) >> panel.group_shift) * P::kColumns;
    const auto finish = [&](const auto& fn) LOWBIT_INLINE {
      each([&](auto r, auto v) LOWBIT_INLINE {
        if constexpr (!kHeld) total[r][v] = load(y_at(r, v));
        total[r][v] = fn(total[r][v], acc[r][v], r, v);
        if constexpr (!kHeld) store(y_at(r, v), total[r][v]);
        acc[r][v] = zero();
      });
    };
    if (a_groups && b_groups) {
      finish([&](F y, F s, auto r, auto v)
                 LOWBIT_INLINE { return fma(mul(s, set1(sa[r])), load(sb + v * kVecLanes), y); });
    } else if (a_groups) {
      finish([&](F y, F s, auto r, auto) LOWBIT_INLINE { return fma(s, set1(sa[r]), y); });
    } else if (b_groups) {
      finish([&](F y, F s, auto, auto v) LOWBIT_INLINE { return fma(s, load(sb + v * kVecLanes), y); });
    } else {
      finish([&](F y, F s, auto, auto) LOWBIT_INLINE { return add(y, s); });
    }
  }
  if constexpr (kHeld) each([&](auto r, auto v) LOWBIT_INLINE { store(y_at(r, v), total[r][v]); });
}

template <class P>
inline void panel_scales(const Fp8Matmul& q, const Fp8Panel& panel, float* out) {
  for (int64_t k = 0; k < panel.k_size; k += int64_t{1} << panel.group_shift, out += P::kColumns) {
    for (int64_t j = 0; j < P::kColumns; ++j) {
      out[j] = panel.n0 + j < q.out.n ? scale_of(q.b.scales, panel.n0 + j, panel.k0 + k) : 0.0f;
    }
  }
}

// Fetches a part of what the next panel is decoded from, lines [begin, end) of a slab of columns.
template <class P>
LOWBIT_INLINE inline void fetch_codes(const Fp8Matmul& q, const Fp8Panel& panel, int64_t begin, int64_t end) {
  const bool last = panel.k0 + panel.slab >= q.out.k;
  const int64_t n0 = last ? panel.n0 + P::kColumns : panel.n0, k0 = last ? 0 : panel.k0 + panel.slab;
  const int64_t lines = panel.slab / 64;
  for (int64_t line = begin; line < end; ++line) {
    if (n0 + line / lines < q.out.n) prefetch(q.b.codes + (n0 + line / lines) * q.b.stride + k0 + line % lines * 64);
  }
}

// All rows of a task with a panel, tiles of kTop rows and smaller ones at the end.
template <class P, int kTop, bool kHeld>
inline void many_rows(const Fp8Matmul& q, const Fp8Panel& panel, const typename P::Element* w, int64_t rows, float* y) {
  const int64_t lines = panel.slab / 64 * P::kColumns;
  int64_t row = 0;
  const auto tiles = [&](auto height) LOWBIT_INLINE {
    for (; row + height <= rows; row += height) {
      fetch_codes<P>(q, panel, row * lines / rows, (row + height) * lines / rows);
      many_tile<P, height, kHeld>(q, panel, w, row, y + row * P::kColumns);
    }
  };
  tiles(std::integral_constant<int, kTop>());
  if constexpr (kTop > 4) tiles(std::integral_constant<int, 4>());
  if constexpr (kTop > 2) tiles(std::integral_constant<int, 2>());
  if constexpr (kTop > 1) tiles(std::integral_constant<int, 1>());
}

// Tasks are blocks of kColumns columns times blocks of kFp8RowsPerTask rows.
template <class P>
void fp8_many_run(const Fp8Matmul& q, const P& p, int64_t begin, int64_t end) {
  // Groups of 16 and 32 end so often that tiles of half the rows, with their sums of groups in registers, are faster.
  constexpr int kMinGroup = 16, kHeldShift = 6;
  const bool a_groups = by_group(q.a.scales), b_groups = by_group(q.b.scales);
  const int64_t row_blocks = ceil_div(q.out.m, kFp8RowsPerTask);
  alignas(64) typename P::Element w[kFp8LongSlab * P::kColumns];
  alignas(64) float scales[kFp8Slab / kMinGroup * P::kColumns], whole_scales[P::kColumns];
  alignas(64) float y[kFp8RowsPerTask * P::kColumns];
  for (int64_t task = begin; task < end; ++task) {
    Fp8Panel panel{};
    panel.slab = a_groups || b_groups ? kFp8Slab : kFp8LongSlab;
    panel.n0 = task / row_blocks * P::kColumns;
    panel.first_row = task % row_blocks * kFp8RowsPerTask;
    panel.group_shift = shift_of(q);
    panel.scales = scales;
    const int64_t left = q.out.m - panel.first_row, rows = left < kFp8RowsPerTask ? left : kFp8RowsPerTask;
    __builtin_memset(y, 0, rows * P::kColumns * sizeof(float));
    for (; panel.k0 < q.out.k; panel.k0 += panel.slab) {
      panel.k_size = q.out.k - panel.k0 < panel.slab ? q.out.k - panel.k0 : panel.slab;
      p.decode_panel(q, panel.n0, panel.k0, ceil_div(panel.k_size, kChunkK) * kChunkK, w);
      if (b_groups) panel_scales<P>(q, panel, scales);
      if (shift_of(q) < kHeldShift) {
        many_rows<P, (P::kRows + 1) / 2, true>(q, panel, w, rows, y);
      } else {
        many_rows<P, P::kRows, false>(q, panel, w, rows, y);
      }
    }
    column_scales(q, panel.n0, P::kColumns, !b_groups, whole_scales);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = panel.first_row + r;
      const float a_scale = a_groups ? 1.0f : scale_of(q.a.scales, row, 0);
      store_scaled(q, row, panel.n0, P::kColumns, a_scale, whole_scales, y + r * P::kColumns);
    }
  }
}

template <class Family>
void fp8_run(const Fp8Matmul& q, int64_t begin, int64_t end) {
  Family::with(q.b.type, [&](const auto& p) {
    if (q.out.m <= kFp8FewRows) {
      fp8_few_run(q, p, begin, end);
    } else {
      fp8_many_run(q, p, begin, end);
    }
  });
}

// Of few rows: [row][group] in the groups of short_tile, and a zero, as its last step may have one group of 16.
inline void row_scales(const Fp8Matmul& q, int64_t row) {
  const int shift = shift_of(q);
  float* out = q.a_scales + row * (((q.out.k - 1) >> shift) + 2);
  for (int64_t k = 0; k < q.out.k; k += int64_t{1} << shift) *out++ = scale_of(q.a.scales, row, k);
  *out = 0;
}

// Row of a: with few rows [row][k], padded to kFp8PadK, else [k / 32][row][32]; and its scales of groups, [group][row].
template <class P>
inline void prepare_row(const Fp8Matmul& q, const P& p, int64_t row) {
  using Element = typename P::Element;
  const uint8_t* in = q.a.codes + row * q.a.stride;
  for (int64_t k = 0; k < q.out.k; k += kFp8PadK) {
    alignas(64) uint8_t last[kFp8PadK] = {};
    const bool whole = k + kFp8PadK <= q.out.k;
    if (!whole) __builtin_memcpy(last, in + k, q.out.k - k);
    const uint8_t* codes = whole ? in + k : last;
    if (q.out.m <= kFp8FewRows) {
      Element* out = static_cast<Element*>(q.prepared) + row * ceil_div(q.out.k, kFp8PadK) * kFp8PadK + k;
      p.prepare_lanes(q, codes, out);
    } else {
      Element* out = static_cast<Element*>(q.prepared) + (k / kChunkK * q.out.m + row) * kChunkK;
      p.prepare_chunks(codes, out, out + q.out.m * kChunkK);
    }
  }
  if (q.out.m <= kFp8FewRows) {
    if (short_groups<P>(q)) row_scales(q, row);
    return;
  }
  if (!q.a_scales) return;
  for (int64_t k = 0; k < q.out.k; k += int64_t{1} << q.a.scales.k_shift) {
    q.a_scales[(k >> q.a.scales.k_shift) * q.out.m + row] = scale_of(q.a.scales, row, k);
  }
}

template <class Family>
void fp8_prepare(const Fp8Matmul& q, int64_t begin, int64_t end) {
  Family::with(q.a.type, [&](const auto& p) {
    for (int64_t row = begin; row < end; ++row) prepare_row(q, p, row);
  });
}

// Defines fp8_matmul_<isa>() for fp8_matmul.cpp.
#define LOWBIT_EXPORT_FP8_MATMUL(Family) LOWBIT_EXPORT_FP8_MATMUL_OF(LOWBIT_ISA, Family)
#define LOWBIT_EXPORT_FP8_MATMUL_OF(set, Family)                                                            \
  namespace lowbit {                                                                                        \
  const Fp8MatmulKernel& LOWBIT_CAT(fp8_matmul_, set)() {                                                   \
    static constexpr Fp8MatmulKernel kernel{"fp8_mm_" LOWBIT_STR(set),                                      \
                                            LOWBIT_ISA_BIT,                                                 \
                                            sizeof(set::Family::Element) == 2 ? Dtype::kBf16 : Dtype::kF32, \
                                            sizeof(set::Family::Element),                                   \
                                            set::Family::kColumns,                                          \
                                            set::fp8_prepare<set::Family>,                                  \
                                            set::fp8_run<set::Family>};                                     \
    return kernel;                                                                                          \
  }                                                                                                         \
  }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
