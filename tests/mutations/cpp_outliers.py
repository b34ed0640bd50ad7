"""The sparse term of weights with outliers, and pruned weights."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("cpu/sparse/outliers-inl.h", "test_outliers", "scalar")(
        ("if (i < count) store(out + i, load_tail(x, dtype, at + i, count - i));", ""),
        ("m0 = task / depths * z.tile, k_begin = task % depths * kOutlierDepth;", "m0 = task / depths * z.tile, k_begin = 0;"),
        ("to_floats(z.x, z.x_dtype, (m0 + r) * z.x_stride + k_begin, count, rows[r]);", "to_floats(z.x, z.x_dtype, (m0 + r) * z.k + k_begin, count, rows[r]);"),
        ("to_floats(z.x, z.x_dtype, m0 * z.x_stride + k_begin,", "to_floats(z.x, z.x_dtype, m0 * z.k + k_begin,"),
        ("out[i * kOutlierTile + r] = rows[r][i];", "out[i * kOutlierTile + r] = rows[0][i];"),
        ("largest = c > largest ? c : largest;", "largest = c;"),
        ("return c < last ? c : last;", "return c;"),
        ("return c < last ? c : last;", "return c < last ? c : 0;"),
        ("return sum_lanes(sums) + rest;", "return sum_lanes(sums);"),
        ("for (; j < count; ++j) rest += values[j]", "for (; j + 1 < count; ++j) rest += values[j]"),
        ("sums[p] = load(y + p * kVecLanes); });", "sums[p] = zero(); });"),
        ("m0 = task / blocks * z.tile, n0 = task % blocks * kOutlierRows;", "m0 = task / blocks * z.tile, n0 = task % blocks * (kOutlierRows + 1);"),
        ("__builtin_memset(y, 0, sizeof(float) * (n_end - n0) * z.tile);", ""),
        ("z.count - j < kEntries ? z.count - j : kEntries, first = n * z.count + j;", "z.count - j < kEntries ? z.count - j : kEntries, first = n * z.count;"),
        ("const int32_t* columns = z.columns + first + r * count;", "const int32_t* columns = z.columns + first;"),
        ("float* sums = y + (n + r - n0) * z.tile;", "float* sums = y + (n + r - n0);"),
        ("*sums += multiply_row", "*sums = multiply_row"),
        ("rows = z.m - m0 < z.tile ? z.m - m0 : z.tile;", "rows = z.tile;"),
        ("out[n] = y[(n - n0) * z.tile + r];", "out[n] = y[(n - n0) * z.tile];"),
    ),
    *cpp("cpu/sparse/outliers-inl.h", "test_outliers", "avx2")(
        ("fma(value, load(at + p * kVecLanes), sums[p])", "fma(value, load(at), sums[p])"),
    ),
    *cpp("cpu/sparse/outliers.cpp", "test_outliers")(
        ("z->padded_k = ceil_div(columns, kOutlierTile) * kOutlierTile;", "z->padded_k = columns / kOutlierTile * kOutlierTile;"),
        ("if (largest < z.k) return;", "if (largest <= z.k) return;"),
        ("parallel(tiles * ceil_div(z.n, kOutlierRows),", "parallel(tiles * (z.n / kOutlierRows),"),
    ),
    *cpp("cpu/sparse/pruned-inl.h", "test_outliers", "avx2")(
        ("column[p] = set1_i(-1);", "column[p] = set1_i(0);"),
        ("add_i(load_u8_lanes(own), one)", "load_u8_lanes(own)"),
        ("values(load_u8_lanes(own + kPrunedRows))", "values(load_u8_lanes(own))"),
        ("const uint8_t* own = step + p * kVecLanes;", "const uint8_t* own = step;"),
        ("next < last ? next : last;", "next;"),
        ("const uint8_t* step = begin + row; step < end + row;", "const uint8_t* step = begin + row; step + kStepBytes < end + row;"),
        ("set1(z.values[step[kPrunedRows + r]])", "set1(z.values[step[kPrunedRows]])"),
        ("z.starts[block] * kStepBytes", "z.starts[0] * kStepBytes"),
        ("z.out[(m0 + r) * z.n + n0 + i] = y[i * p.tile + r];", "z.out[(m0 + r) * z.n + n0 + i] = y[i * p.tile];"),
        ("z.bits <= 4", "z.bits <= 5"),
    ),
    *cpp("cpu/sparse/pruned.cpp", "test_outliers")(
        ("prepare_columns(&x, z.k + 1, &scratch, isa, threads);", "prepare_columns(&x, z.k, &scratch, isa, threads);"),
        ("+ z.k * x.tile, x.tile, 0.0f);", "+ z.k * x.tile, 0, 0.0f);"),
        ("z.starts[blocks] != z.steps ||", ""),
    ),
]  # fmt: skip
