"""FP8 kernels: casts, quantization by blocks, products."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("cpu/fp8/fp8-inl.h", "test_fp8", "scalar")(
        ("set1_i((1 << (f::kDropped - 1)) - 1)), odd)", "set1_i((1 << (f::kDropped - 1)) - 1)), set1_i(1))"),
        ("if_less(magnitude, set1_i(f::kMinNormal), subnormal, normal);\n  return with_sign(min_i(code, set1_i(top))", "if_less(set1_i(f::kMinNormal), magnitude, normal, normal);\n  return with_sign(min_i(code, set1_i(top))"),
        ("kMaxCode = kE4 ? 0x7E : 0x7B", "kMaxCode = kE4 ? 0x7E : 0x7A"),
        ("bit_and(shift_right<24>(bits), set1_i(0x80))", "bit_and(shift_right<25>(bits), set1_i(0x80))"),
        ("return as_float(if_less(set1_i(0), bits, bits, set1_i(0x3F800000)));", "return as_float(bits);"),
        ("if (count < kVecLanes) __builtin_memcpy(out, bytes, count * size);", "if (count < kVecLanes) __builtin_memcpy(out, bytes, (count - 1) * size);"),
    ),
    *cpp("cpu/fp8/fp8-inl.h", "test_fp8", "avx2")(
        ("const I columns = add_i(load_i(kLanes), set1_i(static_cast<int32_t>(column)));", "const I columns = load_i(kLanes);"),
        ("const I uniform = shift_right<32 - f::kDropped>(noise);", "const I uniform = shift_right<31 - f::kDropped>(noise);"),
        ("h = mul_i(xor_i(h, shift_right<15>(h))", "h = mul_i(xor_i(h, shift_right<16>(h))"),
    ),
    *cpp("cpu/fp8/fp8_quantize-inl.h", "test_fp8", "scalar")(
        ("if (i < count) top = max_i(top, magnitude_of(bits_of(load_tail(x, X, at + i, count - i))));", ""),
        ("return row / b.block_rows * b.row_blocks + column / b.block_k;", "return row / b.block_rows * b.row_blocks + column / (b.block_k + 1);"),
        ("for (int64_t r = row; r < row_end; ++r) {\n    if (r + 3", "for (int64_t r = row; r + 1 < row_end; ++r) {\n    if (r + 3"),
        ("end = min_of((column / b.block_k + 1) * b.block_k, g.column_end);", "end = g.column_end;"),
        ("encode_run<X, T, kStochastic>(z, r, c, count, scales[i], noise);", "encode_run<X, T, kStochastic>(z, r, c, count, scales[0], noise);"),
    ),
    *cpp("cpu/fp8/fp8.cpp", "test_fp8")(
        ("out[(c + x) * rows + row + y] = q[(row + y) * k + c + x];", "out[(c + y) * rows + row + x] = q[(row + y) * k + c + x];"),
        ("next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], LOWBIT_HIGH);", "next[2 * i + 1] = __builtin_shufflevector(rows[i + 8], rows[i], LOWBIT_HIGH);"),
    ),
    *cpp("cpu/fp8/fp8_matmul-inl.h", "test_fp8_mm", "scalar")(
        ("columns[c] = n0 + c < q.out.n ? n0 + c : q.out.n - 1;", "columns[c] = n0 + c;"),
        ("const F sa = p.scales(q.a.scales, at.rows[r], first, k_size);", "const F sa = p.scales(q.a.scales, r, first, k_size);"),
        ("sb[c] = p.scales(q.b.scales, at.columns[c], first, k_size);", "sb[c] = p.scales(q.b.scales, at.columns[c], k, k_size);"),
        ("__builtin_memcpy(last, at.b[c] + k, end - k);\n        multiply", "__builtin_memcpy(last, at.b[c] + k, end - k - 1);\n        multiply"),
        ("q.a_scales + (at >> q.a.scales.k_shift) * m + panel.first_row + row : nullptr", "q.a_scales + (at >> q.a.scales.k_shift) * m + row : nullptr"),
        ("const float* sb = panel.scales + ((k - part) >> panel.group_shift) * P::kColumns;", "const float* sb = panel.scales + (k >> panel.group_shift) * P::kColumns;"),
        ("scale_of(q.b.scales, panel.n0 + j, panel.k0 + k) : 0.0f", "scale_of(q.b.scales, panel.n0 + j, k) : 0.0f"),
        ("const int64_t row = panel.first_row + r;", "const int64_t row = r;"),
        ("p.prepare_chunks(codes, out, out + q.out.m * kChunkK);", "p.prepare_chunks(codes, out, out + kChunkK);"),
        ("if (!whole) __builtin_memcpy(last, in + k, q.out.k - k);", "if (!whole) __builtin_memcpy(last, in + k, q.out.k - k + 1);"),
        ("const int64_t i = (row >> s.row_shift) * s.stride + (k >> s.k_shift);", "const int64_t i = row * s.stride + (k >> s.k_shift);"),
    ),
    *cpp("cpu/fp8/fp8_matmul-inl.h", "test_fp8_mm", "avx2")(
        ("  *out = 0;\n", ""),
        ("if constexpr (kTop > 1) tiles(std::integral_constant<int, 1>());", ""),
        ("if ((k & (group - 1)) != 0 && k < panel.k_size) continue;", "if ((k & (group - 1)) != 0) continue;"),
        ("wanted && n0 + j < q.out.n ? scale_of(q.b.scales, n0 + j, 0) : 1.0f", "wanted && n0 + j < q.out.n ? scale_of(q.b.scales, n0, 0) : 1.0f"),
    ),
    *cpp("cpu/fp8/fp8_matmul_f16c-inl.h", "test_fp8_mm", "avx2")(
        ("_mm256_blend_ps(set1(scales[0]), set1(scales[1]), 0xF0)", "_mm256_blend_ps(set1(scales[1]), set1(scales[0]), 0xF0)"),
        ("b_scales[c][count] = 0;", ""),
        ("load_scales(s, first + (k0 >> kShift), count, b_scales[c]);", "load_scales(s, first, count, b_scales[c]);"),
        ("__builtin_memcpy(last, at.b[c] + k0 + k, end - k);", "__builtin_memcpy(last, at.b[c] + k, end - k);"),
        ("const F factor = set1(kWordFactor<T> * other);", "const F factor = set1(kWordFactor<T> * kWordFactor<T>);"),
    ),
    *cpp("cpu/fp8/fp8_matmul_bf16-inl.h", "test_fp8_mm", "avx512bf16")(
        ("_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)", "_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 3, 3, 3, 3, 2, 2, 2, 2)"),
        ("left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1, p)", "~uint64_t{0}, p)"),
        ("if (s.k_shift >= 6) return set1", "if (s.k_shift >= 5) return set1"),
        ("_mm512_store_si512(panel + (k + 2) * kColumns, w.high);", "_mm512_store_si512(panel + (k + 2) * kColumns, w.low);"),
    ),
    *cpp("cpu/fp8/fp8_matmul.cpp", "test_fp8_mm")(
        ("((k - 1) >> kLeastGroup) + 2", "((k - 1) >> kLeastGroup) + 1"),
        ("ceil_div(n, kernel.columns) * ceil_div(m, kFp8RowsPerTask)", "ceil_div(n, kernel.columns)"),
    ),
]  # fmt: skip
