"""y = (a * scale_a) (b * scale_b)^T + bias with FP8 a and b, for every granularity: one main loop.

FP8 tensor cores of Hopper keep 14 bits of a sum, so sums leave them at least every 128 values of K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fp8_quantize import (
    SCALE_F32,
    as_bits,
    as_float,
    block_maxima,
    by_element,
    decode,
    encode,
    scale_bits,
)

IMPRECISE_K = tl.constexpr(128)
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def load_scales(scales, at, valid, E8M0: tl.constexpr):
    """Scales in fp32; 0 where not valid."""
    if E8M0:
        exponent = tl.load(scales + at, mask=valid, other=0).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        values = as_float(tl.where(exponent == 255, _NAN, bits))
    else:
        values = tl.load(scales + at, mask=valid, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_tile(
    codes,
    at,
    valid,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A tile in FP8, or decoded from bytes to COMPUTE, which holds every value exactly; 0 where not valid."""
    if COMPUTE is None:
        tile = tl.load(codes + at, mask=valid, other=0.0)
    else:
        tile = tl.load(codes + at, mask=valid, other=0).to(tl.int32)
        tile = decode(tile, MANTISSA, BIAS, MAX_CODE).to(COMPUTE)
    return tile


@triton.jit
def scaled_mm_kernel(
    a,  # (M, K), unit stride along K; FP8, or its bytes with COMPUTE
    b,  # (N, K), likewise
    scale_a,  # fp32, or bytes of E8M0
    scale_b,
    bias,  # (N,)
    out,  # (M, N); the bytes of FP8 if REQUANTIZE
    out_scales,  # (M, ceil(N / REQUANTIZE)) fp32, written if REQUANTIZE
    m,
    n,
    k,
    a_row,  # elements between rows
    b_row,
    scale_a_row,  # elements between rows of scales, 0 if there is one scale
    scale_b_row,
    MANTISSA_A: tl.constexpr,
    BIAS_A: tl.constexpr,
    MAX_CODE_A: tl.constexpr,
    MANTISSA_B: tl.constexpr,
    BIAS_B: tl.constexpr,
    MAX_CODE_B: tl.constexpr,
    E8M0_A: tl.constexpr,
    E8M0_B: tl.constexpr,
    ROWS_A: tl.constexpr,  # rows that share a scale
    ROWS_B: tl.constexpr,
    GROUP_A: tl.constexpr,  # values along K that do, a multiple of BLOCK_K; 0 for the whole row
    GROUP_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the products, None for FP8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    REQUANTIZE: tl.constexpr,  # columns of y that share a scale, a divisor of BLOCK_N; 0 leaves y as it is
    MANTISSA: tl.constexpr,  # of the FP8 type of `out`
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    EMAX: tl.constexpr,
    TOP: tl.constexpr,
):
    """One tile of y. A step lies in one group of a and of b, and its sum is multiplied by their scales in fp32."""
    # Programs that run together share bands of a and columns of b in L2.
    tall = tl.cdiv(m, BLOCK_M)
    in_band = BAND * tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // in_band * BAND
    height = tl.minimum(tall - first, BAND)
    row_block = first + program % in_band % height
    column_block = program % in_band // height
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < m, columns < n
    a_at = rows.to(tl.int64)[:, None] * a_row
    b_at = columns.to(tl.int64)[:, None] * b_row
    scale_a_at = (rows // ROWS_A).to(tl.int64) * scale_a_row
    scale_b_at = (columns // ROWS_B).to(tl.int64) * scale_b_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        ks = (k0 + tl.arange(0, BLOCK_K))[None, :]
        a_valid, b_valid = in_m[:, None] & (ks < k), in_n[:, None] & (ks < k)
        a_tile = load_tile(a, a_at + ks, a_valid, MANTISSA_A, BIAS_A, MAX_CODE_A, COMPUTE)
        b_tile = load_tile(b, b_at + ks, b_valid, MANTISSA_B, BIAS_B, MAX_CODE_B, COMPUTE)
        b_tile = tl.trans(b_tile)
        if GROUP_A == 0 and GROUP_B == 0:
            total = tl.dot(
                a_tile, b_tile, total, input_precision="ieee", max_num_imprecise_acc=IMPRECISE_K
            )
        else:
            term = tl.dot(a_tile, b_tile, input_precision="ieee")
            if GROUP_A != 0:
                term *= load_scales(scale_a, scale_a_at + k0 // GROUP_A, in_m, E8M0_A)[:, None]
            if GROUP_B != 0:
                term *= load_scales(scale_b, scale_b_at + k0 // GROUP_B, in_n, E8M0_B)[None, :]
            total += term
    if GROUP_A == 0:
        total *= load_scales(scale_a, scale_a_at, in_m, E8M0_A)[:, None]
    if GROUP_B == 0:
        total *= load_scales(scale_b, scale_b_at, in_n, E8M0_B)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    valid = in_m[:, None] & in_n[None, :]
    if REQUANTIZE == 0:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)
    else:
        bits = as_bits(tl.where(in_n[None, :], total, 0.0))
        scale = scale_bits(block_maxima(bits, 1, REQUANTIZE), MAX, EMAX, SCALE_F32)
        groups = tl.cdiv(n, REQUANTIZE)
        wide: tl.constexpr = BLOCK_N // REQUANTIZE
        group = column_block * wide + tl.arange(0, wide)
        scale_at = rows.to(tl.int64)[:, None] * groups + group[None, :]
        in_groups = in_m[:, None] & (group < groups)[None, :]
        tl.store(out_scales + scale_at, as_float(scale), mask=in_groups)
        ratio = tl.div_rn(total, as_float(by_element(scale, 1, REQUANTIZE)))
        tl.store(out + at, encode(ratio, MANTISSA, BIAS, TOP, False), mask=valid)
