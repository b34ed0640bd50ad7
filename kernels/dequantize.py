"""Dense rows of a packed weight."""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import CHUNK, decode, table_values
from .linear import scaled


@triton.jit
def dequantize_kernel(
    indices,  # (M,) int64, each in [0, N); read if GATHERS
    codes,
    scales,  # (groups, N), or packed
    zeros,  # (groups, N), or packed
    table,
    scales2,  # (super-blocks, N), one fp32, or factors and offset
    zeros2,  # (super-blocks, N)
    scale_map,  # (256,) fp32, of SCALE_DQ8
    out,  # (M, K)
    m,
    n,
    k,
    group,
    num_groups,
    super_groups,
    BITS: tl.constexpr,
    CODEC: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCOPE: tl.constexpr,
    SCALE: tl.constexpr,
    SECOND: tl.constexpr,
    GATHERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Row i of `out` is row indices[i] of the weight, or row i: computed in fp32, rounded once."""
    outputs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = outputs < m
    rows = tl.load(indices + outputs, mask=valid, other=0).to(tl.int32) if GATHERS else outputs
    chunk = tl.program_id(1) * CHUNKS
    ks = chunk * CHUNK + tl.arange(0, CHUNKS * CHUNK)
    g = (tl.minimum(ks, k - 1) // group)[None, :]
    fields = decode(codes, chunk, rows, valid, n, k, BITS, CHUNKS)
    values = table_values(
        fields,
        table,
        scales,
        tl.where(valid, rows, 0),
        g,
        n,
        num_groups,
        CODEC,
        BITS,
        OFFSET,
        SCOPE,
    )
    values = scaled(
        values,
        scales,
        zeros,
        scales2,
        zeros2,
        scale_map,
        g,
        rows[:, None],
        valid[:, None],
        n,
        super_groups,
        ZERO,
        SCALE,
        SECOND,
    )
    at = outputs.to(tl.int64)[:, None] * k + ks[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=valid[:, None] & (ks < k)[None, :])
