"""Kernels of quantized weights: codecs, products, dequantize, embedding."""

from __future__ import annotations

from mutations import cpp

MUTANTS = [
    *cpp("cpu/weights/codecs-inl.h", "test_kernels", "scalar")(
        ("constexpr int kShift = S % 2 * 16 + piece.shift - piece.at;", "constexpr int kShift = piece.shift - piece.at;"),
        ("code = select_bits(set1_i((1 << piece.at) - 1), code, bits);", "code = select_bits(set1_i((1 << piece.at) - 1), bits, code);"),
        ("const int64_t g = l.table_groups == 1 ? 0 : group;", "const int64_t g = 0;"),
        ("bit_and(code_of<B, S>(block), set1_i((1 << B) - 1)), kBlockN)", "bit_and(code_of<B, S>(block), set1_i((1 << B) - 2)), kBlockN)"),
        ("first(set1(l.table[0]))", "first(set1(l.table[1]))"),
        ("(block * l.num_groups + group) * kBlockN + lane);\n}\n\n// One table", "block * l.num_groups * kBlockN + lane);\n}\n\n// One table"),
    ),
    *cpp("cpu/weights/common-inl.h", "test_kernels", "scalar")(
        ("mul(sub(load_i8(static_cast<const int8_t*>(terms) + i), table), set1(0.5f))", "mul(load_i8(static_cast<const int8_t*>(terms) + i), set1(0.5f))"),
        ("return load_as(l.scales, l.scale_dtype, i);\n}\nLOWBIT_INLINE inline GroupTerms group_terms", "return load_as(l.scales, l.scale_dtype, i - lane);\n}\nLOWBIT_INLINE inline GroupTerms group_terms"),
        ("static_cast<const uint8_t*>(l.scales) + i)", "static_cast<const uint8_t*>(l.scales) + i - lane)"),
        ("const I row = min_i(column, set1_i(static_cast<int32_t>(l.n - 1)));", "const I row = column;"),
        ("shift_right<kFactorBits>(add_i(first,", "shift_right<kFactorBits - 1>(add_i(first,"),
        ("return add(scale, set1(factors[l.num_supers]));", "return scale;"),
        ("if (l.n - n0 < count) count = l.n - n0;", "if (l.n - n0 < count) count = l.n - n0 + 1;"),
        ("load_tail(l.bias, l.bias_dtype, n0 + j, left)", "load_tail(l.bias, l.bias_dtype, j, left)"),
        ("row * e.gate_stride + n0 + j, left", "row * e.gate_stride + j, left"),
        ("row * e.residual_stride + n0 + j, left));", "row * e.residual_stride + n0, left));"),
        ("const int64_t left = i < l.k ? l.k - i : 0;", "const int64_t left = 0;"),
        ("const int64_t x0 = m * l.x_stride;", "const int64_t x0 = m * l.k;"),
        ("__builtin_memcpy(to + j * size, bytes, (count - j) * size);", "__builtin_memcpy(to + j * size, bytes, (count - j - 1) * size);"),
    ),
    *cpp("cpu/weights/panel-inl.h", "test_kernels", "scalar")(
        ("group_of[i] = (i < valid ? k0 + i : l.k - 1) / l.group;", "group_of[i] = k0 / l.group;"),
        ("add(mul(t.scale, v), t.zero) : mul(t.scale, sub(v, t.zero))", "mul(t.scale, add(v, t.zero)) : mul(t.scale, sub(v, t.zero))"),
        ("if (r < rows) multiply_panel<1>", "if (r + 1 < rows) multiply_panel<1>"),
        ("m0 = task % row_blocks * kRowsPerTask;", "m0 = task / row_blocks * kRowsPerTask;"),
        ("const int64_t count = l.k - k0 < kChunkK ? l.k - k0 : kChunkK;", "const int64_t count = kChunkK;"),
    ),
    *cpp("cpu/weights/embedding-inl.h", "test_kernels", "scalar")(
        ("lane = n % kBlockN;", "lane = row % kBlockN;"),
        ("const int64_t group = (k0 + i) / l.group", "const int64_t group = k0 / l.group"),
        ("? scale * v + z : scale * (v - z)", "? scale * v - z : scale * (v - z)"),
        ("<< bits) * kBlockN + lane;\n        int64_t entry", "<< bits) * kBlockN;\n        int64_t entry"),
        ("[term] & 1) << bits;", "[term] & 2) << bits;"),
    ),
    *cpp("core/trits.h", "test_kernels", "scalar")(
        ("(last > 2) + (last > 5)", "(last > 2)"),
        ("fifths[b] | (fifths_of(in[b]) & field)", "fifths[b] | fifths_of(in[b])"),
        ("words + word_unit(15, stride), trits + (kTritUnits - 1) * kUnitBytes, kCount", "words + word_unit(15, stride), trits, kCount"),
    ),
    *cpp("cpu/weights/trits-inl.h", "test_kernels", "avx2")(
        ("c + kTritChunks <= chunks", "c + kTritChunks < chunks"),
        ("trits += vector_bytes(kTritUnits);", ""),
    ),
    *cpp("core/dispatch.cpp", "test_kernels")(
        ("const int64_t block = task / tasks, last", "const int64_t block = task, last"),
        ("l.codes + block * block_bytes(l.k, kTritBits, true)", "l.codes"),
    ),
    *cpp("cpu/weights/nibbles-inl.h", "test_kernels", "avx2")(
        ("_mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)", "_mm256_setr_epi32(0, 4, 1, 5, 2, 7, 3, 6)"),
        ("return bit_and(shift_right<4>(bytes), mask);", "return bit_and(shift_right<3>(bytes), mask);"),
        ("const float* at = x[r] + 2 * kHalf;", "const float* at = x[r] + kHalf;"),
        ("or_i(index, xor_i(chosen, set1_bytes(-128)))", "or_i(index, chosen)"),
        ("byte_plane(l.table + (1 << kBits), i)", "byte_plane(l.table, i)"),
        ("high(byte_plane(l.table, 3))", "high(byte_plane(l.table, 2))"),
        ("_mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]))", "_mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[2]), _mm256_hadd_ps(sums[1], sums[3]))"),
    ),
    *cpp("cpu/weights/gemv-inl.h", "test_kernels", "avx2")(
        ("rows[r] = m0 + (r < valid_rows ? r : 0);", "rows[r] = m0;"),
        ("acc.template copy_to<0>(Sums::kOfPart, of_half[0]);\n        acc.clear(Sums::kOfPart);", "acc.template copy_to<0>(Sums::kOfPart, of_half[0]);"),
        ("total[r][v] = first ? sums[r][v] : add(total[r][v], sums[r][v]);", "total[r][v] = sums[r][v];"),
        ("l.x_sums[rows[r] * l.num_groups + group] : 0.0f;\n        y[r][v] = finish_group(l, terms, y[r][v], total", "l.x_sums[rows[r] * l.num_groups] : 0.0f;\n        y[r][v] = finish_group(l, terms, y[r][v], total"),
        ("l.x_sums[rows[r] * l.num_groups + group] : 0.0f;\n        y[r][v] = finish_group(l, terms, y[r][v], sums", "l.x_sums[rows[r] * l.num_groups] : 0.0f;\n        y[r][v] = finish_group(l, terms, y[r][v], sums"),
    ),
    *cpp("cpu/weights/f16-inl.h", "test_kernels", "avx512bf16")(
        ("const __m512i second = add_i(first, set1_i(8));", "const __m512i second = add_i(first, set1_i(4));"),
        ("const F low = _mm512_maskz_sub_ps(finite, v, high);", "const F low = _mm512_maskz_sub_ps(finite, v, v);"),
        ("uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * kChunkK * kHalfTerms;", "uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * kChunkK;"),
    ),
    *cpp("cpu/weights/amx-inl.h", "test_kernels", "amxbf16")(
        ("l.x_sums[(row + r) * l.num_groups + group]", "l.x_sums[row * l.num_groups + group]"),
        ("if (p.begin % per_group == 0) {", "if (p.begin == 0) {"),
        ("return x + at / kChunkK * rows * kChunkK + at % kChunkK;", "return x + at / kChunkK * rows * kChunkK;"),
        ("rows = l.m - first < kTile ? l.m - first : kTile;", "rows = kTile;"),
        ("p.terms.at(group - p.begin / per_group, v * kTile)", "p.terms.at(0, v * kTile)"),
        ("finish(step + 3, sums[3]);", "finish(step + 2, sums[3]);"),
    ),
    *cpp("cpu/weights/columns-inl.h", "test_kernels", "avx512bf16")(
        ("out[1] = k + 1 < l.k ? x[k + 1] : uint16_t{0};", "out[1] = k < l.k ? x[k + 1] : uint16_t{0};"),
        ("if (l.table_groups > 1 && slab.end > group_end) slab.end = group_end;", ""),
        ("if (slab.begin == 0 || l.table_groups > 1) {", "if (slab.begin == 0) {"),
    ),
]  # fmt: skip
