"""The compiled decoder: attention, row-wise functions, what threads share out."""

from __future__ import annotations

from mutations import cpp

TEST = "tests/decoder/test_decoder.py"
MUTANTS = [
    *cpp("cpu/attention-inl.h", TEST, "scalar")(
        ("limit = a.first_limit + row / a.group;", "limit = a.first_limit + row / a.group - 1;"),
        ("a.sum[row] = a.sum[row] * rescale + sum(total);", "a.sum[row] = a.sum[row] + sum(total);"),
        ("if (last && position % 2 == 0) __builtin_memset(values + c.padded_dim, 0, c.dim * sizeof(float));", ""),
        ("for (int64_t i = count; i < kKeyBlock; ++i) p[r][i] = -__builtin_inff();", ""),
        ("total += parts[i].sum * exp(parts[i].max - most);", "total += parts[i].sum;"),
        ("(seen + 1) / 2, w", "seen / 2, w"),
    ),
    *cpp("cpu/rows-inl.h", TEST, "scalar")(
        ("__builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps)", "__builtin_sqrtf(sum(squares) / static_cast<float>(n))"),
        ("__builtin_memcpy(swapped + half, scratch, half * sizeof(float));", "__builtin_memcpy(swapped + half, scratch + half, half * sizeof(float));"),
        ("if (found > best) {", "if (found >= best) {"),
    ),
    *cpp("decoder_worker.cpp", TEST)(
        ("const int64_t first = head / group * blocks;", "const int64_t first = head * blocks;"),
        ("store_rows(layer, position, logits ? last : rows);", "store_rows(layer, position, last);"),
        ("position + i, my.q + r * d.head_padded_);", "position, my.q + r * d.head_padded_);"),
        ("begin -= part.tasks;", ""),
    ),
    *cpp("decoder.cpp", TEST)(
        ("other.x_scale == part.x_scale && ", ""),
        ("values_.data() + head * static_cast<size_t>(head_padded_)", "values_.data() + head * static_cast<size_t>(config_.head_dim)"),
        ("position += rows;", ""),
    ),
]  # fmt: skip
