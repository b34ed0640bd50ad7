"""y = x W^T + bias over packed weights, for every format and M: one main loop, K split over programs for small M."""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import (
    CHUNK,
    SCALE_NONE,
    ZERO_FLOAT,
    ZERO_INT,
    ZERO_MIN,
    added_zero,
    decode,
    scale_of,
    table_values,
)


@triton.jit
def linear_kernel(
    x,  # (M, K), strides (x_row, x_column)
    codes,
    scales,  # (groups, N), or packed
    zeros,  # (groups, N), or packed
    table,
    scales2,  # (super-blocks, N), one fp32, or factors and offset
    zeros2,  # (super-blocks, N)
    scale_map,  # (256,) fp32, of SCALE_DQ8
    bias,  # (N,)
    out,  # (SPLITS, M, N) fp32 if SPLITS > 1, else (M, N)
    m,
    n,
    k,
    x_row,
    x_column,
    group,  # weights that share a scale
    num_groups,
    super_groups,  # groups that share a second level
    chunks_per_split,  # a multiple of CHUNKS
    BITS: tl.constexpr,
    CODEC: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCOPE: tl.constexpr,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    APART: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """One tile of y. Products are of x and table entries in COMPUTE, sums are fp32.

    APART: a step of CHUNKS chunks lies in one group; its sum is multiplied by the scale, which is then never rounded.
    WHOLE: there is one group, whose scale multiplies at the end; not with ZERO_MIN. Not APART: groups may end anywhere,
    and the scaled weight is rounded to COMPUTE. WIDENS: x and out are fp32 and so are products, of values
    that are rounded to COMPUTE all the same; for Triton's interpreter, which cuts off where it should round to bf16.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    in_n, in_m = columns < n, rows < m
    table_rows = tl.where(in_n, columns, 0)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * chunks_per_split
    last = tl.minimum(first + chunks_per_split, tl.cdiv(k, CHUNK))
    for chunk in range(first, last, CHUNKS):
        ks = chunk * CHUNK + tl.arange(0, CHUNKS * CHUNK)
        xs = tl.load(
            x_rows + ks.to(tl.int64)[None, :] * x_column,
            mask=in_m[:, None] & (ks < k)[None, :],
            other=0.0,
        ).to(tl.float32 if WIDENS else COMPUTE)
        fields = decode(codes, chunk, columns, in_n, n, k, BITS, CHUNKS)
        if APART:
            g = chunk * CHUNK // group
            at = g * n + columns
            if ZERO == ZERO_INT:
                zero = tl.load(zeros + at, mask=in_n, other=0).to(tl.int32)
                fields -= zero[:, None]
            values = table_values(
                fields, table, scales, table_rows, g, n, num_groups, CODEC, BITS, OFFSET, SCOPE
            )
            values = tl.trans(rounded(values, COMPUTE, WIDENS))
            if WHOLE:
                total = tl.dot(xs, values, total, input_precision="ieee")
            else:
                term = tl.dot(xs, values, input_precision="ieee")
            if ZERO == ZERO_FLOAT:
                zero = tl.load(zeros + at, mask=in_n, other=0.0).to(tl.float32)
            if ZERO == ZERO_MIN:
                zero = added_zero(zeros, zeros2, g, columns, in_n, n, super_groups, SCALE, SECOND)
            if ZERO == ZERO_FLOAT or ZERO == ZERO_MIN:
                shift = tl.sum(xs.to(tl.float32), 1)[:, None] * zero[None, :]
            if ZERO == ZERO_FLOAT:
                if WHOLE:
                    total -= shift
                else:
                    term -= shift
            if not WHOLE:
                if SCALE != SCALE_NONE:
                    term *= scale_of(
                        scales, scales2, scale_map, g, columns, in_n, n, super_groups, SCALE, SECOND
                    )[None, :]
                if ZERO == ZERO_MIN:
                    term += shift
                total += term
        else:
            g = (tl.minimum(ks, k - 1) // group)[None, :]
            weight = table_values(
                fields, table, scales, table_rows, g, n, num_groups, CODEC, BITS, OFFSET, SCOPE
            )
            weight = scaled(
                weight,
                scales,
                zeros,
                scales2,
                zeros2,
                scale_map,
                g,
                columns[:, None],
                in_n[:, None],
                n,
                super_groups,
                ZERO,
                SCALE,
                SECOND,
            )
            weight = tl.trans(rounded(weight, COMPUTE, WIDENS))
            total = tl.dot(xs, weight, total, input_precision="ieee")
    if APART and (ZERO == ZERO_FLOAT or ZERO == ZERO_MIN):
        spoilt = tl.max(tl.max((total != total).to(tl.int32), 1), 0)
        if spoilt > 0:
            # x . values and x . zeros apart are infinity - infinity where x is infinite. There y is the sum of what is
            # not finite in x, each with the sign of its weight.
            infinite = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for chunk in range(first, last, CHUNKS):
                ks = chunk * CHUNK + tl.arange(0, CHUNKS * CHUNK)
                xs = tl.load(
                    x_rows + ks.to(tl.int64)[None, :] * x_column,
                    mask=in_m[:, None] & (ks < k)[None, :],
                    other=0.0,
                ).to(tl.float32 if WIDENS else COMPUTE)
                fields = decode(codes, chunk, columns, in_n, n, k, BITS, CHUNKS)
                g = chunk * CHUNK // group
                values = table_values(
                    fields, table, scales, table_rows, g, n, num_groups, CODEC, BITS, OFFSET, SCOPE
                )
                weight = scaled(
                    values,
                    scales,
                    zeros,
                    scales2,
                    zeros2,
                    scale_map,
                    g,
                    columns[:, None],
                    in_n[:, None],
                    n,
                    super_groups,
                    ZERO,
                    SCALE,
                    SECOND,
                )
                signs = (weight > 0).to(tl.float32) - (weight < 0).to(tl.float32)
                signs = tl.trans(rounded(signs, COMPUTE, WIDENS))
                xs = tl.where(xs - xs == 0, 0.0, xs)
                infinite = tl.dot(xs, signs, infinite, input_precision="ieee")
            total = tl.where(infinite - infinite == 0, total, infinite)
    if WHOLE and SCALE != SCALE_NONE:
        scale = scale_of(
            scales, scales2, scale_map, 0, columns, in_n, n, super_groups, SCALE, SECOND
        )
        total *= scale[None, :]
    if HAS_BIAS and SPLITS == 1:
        total += tl.load(bias + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = (split.to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def rounded(values, COMPUTE: tl.constexpr, WIDENS: tl.constexpr):
    """fp32 values to nearest even in COMPUTE; as fp32 if WIDENS."""
    if WIDENS and COMPUTE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = tl.where(values != values, values, nearest.to(tl.float32, bitcast=True))
    elif WIDENS:
        result = values.to(COMPUTE).to(tl.float32)
    else:
        result = values.to(COMPUTE)
    return result


@triton.jit
def scaled(
    values,
    scales,
    zeros,
    scales2,
    zeros2,
    scale_map,
    group,
    columns,
    valid,
    n,
    super_groups,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
):
    """scale * (value - zero), or scale * value + zero for ZERO_MIN; each operation rounds once."""
    if ZERO == ZERO_INT or ZERO == ZERO_FLOAT:
        values -= tl.load(zeros + group * n + columns, mask=valid, other=0).to(tl.float32)
    if SCALE != SCALE_NONE:
        values *= scale_of(
            scales, scales2, scale_map, group, columns, valid, n, super_groups, SCALE, SECOND
        )
    if ZERO == ZERO_MIN:
        values += added_zero(zeros, zeros2, group, columns, valid, n, super_groups, SCALE, SECOND)
    return values


@triton.jit
def add_splits_kernel(
    parts,  # (SPLITS, size) fp32
    bias,  # (n,)
    out,  # (size,)
    size,
    n,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the parts, in order, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    total = tl.load(parts + at, mask=valid, other=0.0)
    for _ in range(1, SPLITS):
        parts += size
        total += tl.load(parts + at, mask=valid, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % n, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)
