"""Codes of the layout that `lowbit.layouts.k16` describes, and the values they stand for: every codec, once."""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import CHUNK as _CHUNK

CHUNK = tl.constexpr(_CHUNK)
# How codes become values and where zeros stand: constants of the kernels.
AFFINE, LUT = tl.constexpr(0), tl.constexpr(1)
ZERO_NONE, ZERO_INT, ZERO_FLOAT, ZERO_MIN = (tl.constexpr(i) for i in range(4))
TABLE_SHARED, TABLE_ROW, TABLE_GROUP, TABLE_PAIR = (tl.constexpr(i) for i in range(4))
# What the bytes of a scale are, and whether one number for the weight or one for a super-block of a row multiplies it.
# Of SCALE_INT7 the lowest bit is the number of a table, of a pair.
SCALE_NONE, SCALE_NUMBER, SCALE_E4M3, SCALE_E8M0, SCALE_DQ8, SCALE_INT7 = (
    tl.constexpr(i) for i in range(6)
)
# Integers of less than a byte, as zeros that are added then are: a little-endian bit stream of N for each group.
SCALE_UINT4, SCALE_INT6 = tl.constexpr(6), tl.constexpr(7)
SECOND_NONE, SECOND_ONE, SECOND_ROW = (tl.constexpr(i) for i in range(3))


@triton.jit
def plane_fields(codes, base, chunk, rows, valid, n, P: tl.constexpr, CHUNKS: tl.constexpr):
    """(rows, CHUNKS * 16) int32: the P bits that a plane holds of each code of CHUNKS chunks from `chunk` on.

    The plane starts after `base` pieces of 16 words. CHUNKS divides 32 / P, and `chunk` is a multiple of it.
    """
    per_word: tl.constexpr = 32 // P
    piece = base + chunk // per_word * n + rows
    at = piece.to(tl.int64)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    words = tl.load(codes + at, mask=valid[:, None], other=0)
    shifts = (chunk % per_word + tl.arange(0, CHUNKS)) * P
    fields = (words[:, None, :] >> shifts[None, :, None]) & ((1 << P) - 1)
    return tl.reshape(fields, (rows.shape[0], CHUNKS * CHUNK))


@triton.jit
def decode(codes, chunk, rows, valid, n, k, BITS: tl.constexpr, CHUNKS: tl.constexpr):
    """(rows, CHUNKS * 16) int32: codes of CHUNKS chunks from `chunk` on; 0 in rows that are not valid."""
    low: tl.constexpr = 4 if BITS == 5 or BITS == 6 else 2 if BITS == 3 else BITS
    fields = plane_fields(codes, 0, chunk, rows, valid, n, low, CHUNKS)
    if low != BITS:
        base = tl.cdiv(tl.cdiv(k, CHUNK), 32 // low) * n
        fields |= plane_fields(codes, base, chunk, rows, valid, n, BITS - low, CHUNKS) << low
    return fields


@triton.jit
def table_values(
    codes,  # (rows, weights) int32
    table,  # fp32: (E,), (2, E), (N, E) or (N, groups, E)
    scales,  # (groups, N), of TABLE_PAIR
    rows,  # (rows,)
    group,  # of each weight, (1, weights), or a scalar
    n,
    num_groups,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    SCOPE: tl.constexpr,
):
    """fp32 values of codes with scale 1; an affine code c stands for c - OFFSET."""
    if CODEC == AFFINE:
        values = (codes - OFFSET).to(tl.float32)
    else:
        entries: tl.constexpr = 1 << BITS
        if SCOPE == TABLE_PAIR:
            codes += (tl.load(scales + group * n + rows[:, None]).to(tl.int32) & 1) * entries
        if SCOPE == TABLE_SHARED or SCOPE == TABLE_PAIR:
            # From shared memory: a load that depends on a load would be fetched ahead one entry at a time.
            every: tl.constexpr = 2 * entries if SCOPE == TABLE_PAIR else entries
            shared = tl.load(table + tl.arange(0, every))
            flat = tl.reshape(codes, (codes.shape[0] * codes.shape[1],))
            values = tl.reshape(tl.gather(shared, flat, 0), codes.shape)
        else:
            at = codes
            if SCOPE == TABLE_ROW:
                at += rows[:, None] * entries
            else:
                at += (rows[:, None] * num_groups + group) * entries
            values = tl.load(table + at)
    return values


@triton.jit
def scale_of(
    scales,  # (groups, N), or packed
    scales2,  # (super-blocks, N), one fp32, or of SCALE_DQ8 the factors and the offset
    scale_map,  # (256,) fp32, of SCALE_DQ8
    group,
    columns,
    valid,
    n,
    super_groups,  # groups of a super-block
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
):
    """fp32 scales; their product with a second level is rounded once, as are product and sum of SCALE_DQ8."""
    at = group * n + columns
    if SCALE == SCALE_NUMBER:
        scale = tl.load(scales + at, mask=valid, other=0.0).to(tl.float32)
    elif SCALE == SCALE_INT7:
        scale = (tl.load(scales + at, mask=valid, other=0).to(tl.int32) >> 1).to(tl.float32)
    elif SCALE >= SCALE_UINT4:
        scale = packed_integers(scales, group, columns, valid, n, SCALE)
    elif SCALE == SCALE_E4M3:
        byte = tl.load(scales + at, mask=valid, other=0).to(tl.int32)
        magnitude = byte & 127
        # The exponent and the mantissa lie as those of an fp32 that is 2^120 times smaller.
        small = ((magnitude << 20) | ((byte & 128) << 24)).to(tl.float32, bitcast=True)
        scale = tl.where(magnitude == 127, float("nan"), small * 1.329227995784916e36)
    elif SCALE == SCALE_E8M0:
        byte = tl.load(scales + at, mask=valid, other=0).to(tl.int32)
        # 0 stands for a subnormal number, 255 for NaN.
        bits = tl.where((byte == 0) | (byte == 255), (byte << 23) | 0x400000, byte << 23)
        scale = bits.to(tl.float32, bitcast=True)
    elif SCALE == SCALE_DQ8:
        code = tl.load(scales + at, mask=valid, other=0).to(tl.int32)
        # 256 scales of the flattened (N, groups) share a factor.
        flat = columns * super_groups + group
        factor = tl.load(scales2 + flat // 256, mask=valid, other=0.0)
        offset = tl.load(scales2 + tl.cdiv(n * super_groups, 256))
        scale = tl.load(scale_map + code) * factor + offset
    return with_second(scale, scales2, group, columns, valid, n, super_groups, SECOND)


@triton.jit
def with_second(terms, second, group, columns, valid, n, super_groups, SECOND: tl.constexpr):
    """fp32 terms times their second level."""
    if SECOND == SECOND_ONE:
        terms *= tl.load(second)
    elif SECOND == SECOND_ROW:
        at = group // super_groups * n + columns
        terms *= tl.load(second + at, mask=valid, other=0.0).to(tl.float32)
    return terms


@triton.jit
def packed_integers(packed, group, columns, valid, n, SCALE: tl.constexpr):
    """fp32 integers of 4 or 6 bits, (groups, ceil(N / 4) * 4 of them)."""
    bits: tl.constexpr = 4 if SCALE == SCALE_UINT4 else 6
    # No masks, which would take registers: all columns that are not valid read the first one's.
    bit = tl.where(valid, columns, 0) * bits
    shift = bit % 8
    at = group * (tl.cdiv(n, 4) * (bits // 2)) + bit // 8
    both = tl.load(packed + at).to(tl.int32)
    if bits == 6:
        both |= tl.load(packed + at + (shift > 2)).to(tl.int32) << 8
    code = (both >> shift) & ((1 << bits) - 1)
    if SCALE == SCALE_INT6:
        code = (code ^ 32) - 32
    return code.to(tl.float32)


@triton.jit
def added_zero(
    zeros,  # (groups, N), or packed
    zeros2,  # (super-blocks, N)
    group,
    columns,
    valid,
    n,
    super_groups,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
):
    """fp32 zeros that are added; their product with a second level is rounded once."""
    if SCALE >= SCALE_UINT4:
        zero = packed_integers(zeros, group, columns, valid, n, SCALE)
    else:
        zero = tl.load(zeros + group * n + columns, mask=valid, other=0.0).to(tl.float32)
    return with_second(zero, zeros2, group, columns, valid, n, super_groups, SECOND)
