"""Kernels of int8 and binary activations."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("cpu/activations/quantize-inl.h", "test_activations", "scalar")(
        ("if (i < count) top = max_i(top, bit_and(bits_of(load_tail(x, dtype, at + i, count - i)), magnitude));", ""),
        ("low = set1(-127.0f)", "low = set1(-128.0f)"),
        ("z.scales[row * groups + g] = absmax / 127.0f;", "z.scales[row * groups + g] = absmax / 128.0f;"),
        ("const int64_t at = row * z.x_stride + begin;", "const int64_t at = row * z.k + begin;"),
        ("count = left < z.group ? left : z.group;\n", "count = left < z.group ? left - 1 : z.group;\n"),
    ),
    *cpp("cpu/activations/quantize-inl.h", "test_kernels", "scalar")(
        ("for (int64_t k = begin; k < end; ++k) sum += x[k];", "for (int64_t k = begin; k + 1 < end; ++k) sum += x[k];"),
        ("const int64_t begin = i * s.size + p * kMaxInt8Group;", "const int64_t begin = i * s.size;"),
        ("l.x_scales[row * s.blocks + s.block(segment)]", "l.x_scales[row * s.blocks]"),
        ("const int64_t group = l.x_group > 0 ? l.x_group : l.k;", "const int64_t group = l.k;"),
        ("    store(y + i, zero());\n", ""),
    ),
    *cpp("cpu/activations/quantize-inl.h", "test_kernels", "avx2")(
        ("__builtin_memset(out + l.k, 0, l.prepared_stride - l.k);\n  return out;", "return out;"),
    ),
    *cpp("cpu/activations/int8_any-inl.h", "test_kernels", "scalar")(
        ("acc[i] -= static_cast<const int8_t*>(l.zeros)[at + i] * x_sum;", "acc[i] += static_cast<const int8_t*>(l.zeros)[at + i] * x_sum;"),
        ("add(mul(t.scale, term), shift) : mul(t.scale, sub(term, shift))", "mul(t.scale, add(term, shift)) : mul(t.scale, sub(term, shift))"),
        ("const int32_t x_sum = part_sums(l, s, row)[part];", "const int32_t x_sum = part_sums(l, s, row)[0];"),
        ("group = s.group(segment), at", "group = segment, at"),
        ("static_cast<int16_t>(kCodec == Codec::kInt ? c + static_cast<int>(l.table[0]) : l.table_i8[c])", "static_cast<int16_t>(kCodec == Codec::kInt ? c + static_cast<int>(l.table[0]) : l.table_i8[c] - 1)"),
        ("k_end = (c + 1) * kChunkK < l.k ? (c + 1) * kChunkK : l.k;", "k_end = (c + 1) * kChunkK;"),
        ("row_scale(l, m0 + r)", "row_scale(l, r)"),
        ("__builtin_memset(acc, 0, kBlockN * sizeof(int32_t));\n}", "}"),
    ),
    *cpp("cpu/activations/int8-inl.h", "test_kernels", "avx2")(
        ("mul_i(load_i8_lanes(zeros), set1_i(-x_sum))", "mul_i(load_i8_lanes(zeros), set1_i(x_sum))"),
        ("rows[r] = m0 + (r < valid_rows ? r : 0);", "rows[r] = m0 + r;"),
        (": load_i(carry + r * kBlockN + lane);", ": load_i(carry + lane);"),
        ("for (; r < rows; ++r) multiply(std::integral_constant<int, 1>{}, r);", ""),
        ("const int64_t left = l.m - span.first_row, rows", "const int64_t left = l.m, rows"),
        ("word_code<B, kFirst>(columns), word_code<B, kSecond>(columns)", "word_code<B, kSecond>(columns), word_code<B, kFirst>(columns)"),
        ("float_terms<kPlain>(l, span.block, group, lane);", "float_terms<kPlain>(l, 0, group, lane);"),
        ("    const int64_t group = s.group(segment);\n    each(", "    const int64_t group = segment;\n    each("),
    ),
    *cpp("cpu/activations/xnor-inl.h", "test_kernels", "avx2")(
        ("if (k_left < kChunkK) bits &= (1u << k_left) - 1;", ""),
        ("sub_i(size, shift_left<1>(sums[r][v]))", "sub_i(size, sums[r][v])"),
        ("const int64_t k_end = last * kChunkK < l.k ? last * kChunkK : l.k;", "const int64_t k_end = last * kChunkK;"),
        ("group_scale(l, block, group, lane0 + v * kVecLanes)", "group_scale(l, block, group, lane0)"),
    ),
    *cpp("cpu/activations/quantize_ops-inl.h", "test_activations", "avx2")(
        ("z.scales[row] = sum_lanes(sums) / static_cast<float>(z.k);", "z.scales[row] = sum_lanes(sums) / static_cast<float>(ceil_div(z.k, kVecLanes) * kVecLanes);"),
        ("i < z.k && i < begin + kPiece", "i + kVecLanes <= z.k && i < begin + kPiece"),
    ),
    *cpp("cpu/activations/quantize_ops-inl.h", "tests/ops/test_binary.py", "avx2")(
        ("if (left < kVecLanes) mask &= (1u << left) - 1;", ""),
    ),
    *cpp("cpu/activations/xnor-inl.h", "tests/ops/test_binary.py", "avx2")(
        ("if (!first) sums[r][v] = add_i(sums[r][v], load_i(counted[r] + v * kVecLanes));", ""),
        ("const F factor = set1(l.x_scales[rows[r]]);", "const F factor = set1(l.x_scales[0]);"),
    ),
    *cpp("core/int8_table.cpp", "tests/ops/test_int8.py")(
        ("if (std::isfinite(magnitude) && magnitude > step) step = magnitude;", "if (magnitude > step) step = magnitude;"),
        ("ratio < -128.0f ? -128.0f", "ratio < -127.0f ? -127.0f"),
    ),
]  # fmt: skip
