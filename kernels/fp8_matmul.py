"""y = (a * scale_a) (b * scale_b)^T + bias with FP8 a and b, for every granularity: one main loop.

Programs are persistent: each takes tiles of y, or of a part of their sums, until there are none. Tiles of a and b come
through tensor descriptors, which GPUs from sm_90 on load with TMA, or by pointers.
FP8 tensor cores of Hopper keep 14 bits of a sum, so sums leave them at least every 128 values of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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
def load_scales(
    scales,
    first,  # row
    group,
    rows,
    row_stride,
    E8M0: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scales of BLOCK rows in fp32, 0 beyond the matrix; one is read if the rows share it."""
    if ROWS % BLOCK == 0:
        at = (first // ROWS).to(tl.int64) * row_stride + group
        valid = first < rows
    else:
        r = first + tl.arange(0, BLOCK)
        at = (r // ROWS).to(tl.int64) * row_stride + group
        valid = r < rows
    if E8M0:
        exponent = tl.load(scales + at, mask=valid, other=0).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        values = as_float(tl.where(exponent == 255, _NAN, bits))
    else:
        values = tl.load(scales + at, mask=valid, other=0.0).to(tl.float32)
    return tl.broadcast_to(values, (BLOCK,))


def descriptor(codes: torch.Tensor, block_rows: int, block_k: int) -> TensorDescriptor:
    """Names tiles of a matrix to TMA; `configs.tma_obstacle` says which matrices may have one."""
    return TensorDescriptor(codes, [*codes.shape], [*codes.stride()], [block_rows, block_k])


@triton.jit
def load_tile(
    codes,
    first,  # row
    k0,
    rows,
    k,
    row_stride,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile in FP8, or decoded from bytes to COMPUTE, which holds every value exactly; 0 beyond the matrix."""
    if TMA:
        tile = codes.load([first, k0])
    else:
        r = first + tl.arange(0, BLOCK_ROWS)
        c = k0 + tl.arange(0, BLOCK_K)
        at = r.to(tl.int64)[:, None] * row_stride + c[None, :]
        valid = (r < rows)[:, None] & (c < k)[None, :]
        tile = tl.load(codes + at, mask=valid, other=0.0 if COMPUTE is None else 0)
    if COMPUTE is not None:
        tile = decode(tile.to(tl.int32), MANTISSA, BIAS, MAX_CODE).to(COMPUTE)
    return tile


@triton.jit
def place_of(tile, tall, wide, BAND: tl.constexpr):
    """Row and column of a tile: tiles that are computed together share bands of a and columns of b in L2."""
    in_band = BAND * wide
    first = tile // in_band * BAND
    height = tl.minimum(tall - first, BAND)
    return first + tile % in_band % height, tile % in_band // height


@triton.jit
def store_quantized(
    total,
    out,
    out_scales,
    at,
    valid,
    rows,
    in_m,
    in_n,
    column_block,
    n,
    BLOCK_N: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    EMAX: tl.constexpr,
    TOP: tl.constexpr,
):
    """Stores a tile of y in FP8, and its scales."""
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


@triton.jit
def scaled_mm_kernel(
    a,  # (M, K), unit stride along K; FP8, or its bytes with COMPUTE; a descriptor with TMA
    b,  # (N, K), likewise
    scale_a,  # fp32, or bytes of E8M0
    scale_b,
    bias,  # (N,)
    out,  # (SPLITS, M, N) fp32 if SPLITS > 1, else (M, N); the bytes of FP8 if REQUANTIZE
    out_scales,  # (M, ceil(N / REQUANTIZE)) fp32, written if REQUANTIZE
    m,
    n,
    k,
    k_per_split,  # a multiple of BLOCK_K
    a_row,  # elements between rows, for pointers
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
    ROWS_A: tl.constexpr,  # rows that share a scale, 1 or a multiple of every tile
    ROWS_B: tl.constexpr,
    GROUP_A: tl.constexpr,  # values along K that do, a multiple of BLOCK_K; 0 for the whole row
    GROUP_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the products, None for FP8
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of K, whose sums add_splits_kernel adds, with the bias; 1 if REQUANTIZE
    REQUANTIZE: tl.constexpr,  # columns of y that share a scale, a divisor of BLOCK_N; 0 leaves y as it is
    MANTISSA: tl.constexpr,  # of the FP8 type of `out`
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    EMAX: tl.constexpr,
    TOP: tl.constexpr,
):
    """Tiles of y. A step lies in one group of a and of b, and its sum is multiplied by their scales in fp32."""
    tall, wide = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles = tall * wide
    # With TMA, both loops become one: loads for a tile are issued while the one before it is multiplied and stored.
    # Pointers of two tiles at a time would take too many registers.
    for item in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=TMA):
        row_block, column_block = place_of(item % tiles, tall, wide, BAND)
        first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
        split = item // tiles
        first_k, last_k = 0, k  # the same for all items, or `flatten` would not merge the loops
        if SPLITS > 1:
            first_k = split * k_per_split
            last_k = tl.minimum(first_k + k_per_split, k)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(first_k, last_k, BLOCK_K):
            a_tile = load_tile(
                a, first_row, k0, m, k, a_row,
                MANTISSA_A, BIAS_A, MAX_CODE_A, COMPUTE, TMA, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            b_tile = load_tile(
                b, first_column, k0, n, k, b_row,
                MANTISSA_B, BIAS_B, MAX_CODE_B, COMPUTE, TMA, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_tile = tl.trans(b_tile)
            if GROUP_A == 0 and GROUP_B == 0:
                total = tl.dot(
                    a_tile, b_tile, total, input_precision="ieee", max_num_imprecise_acc=IMPRECISE_K
                )
            else:
                term = tl.dot(a_tile, b_tile, input_precision="ieee")
                if GROUP_A != 0:
                    group = k0 // GROUP_A
                    scale = load_scales(
                        scale_a, first_row, group, m, scale_a_row, E8M0_A, ROWS_A, BLOCK_M
                    )
                    term *= scale[:, None]
                if GROUP_B != 0:
                    group = k0 // GROUP_B
                    scale = load_scales(
                        scale_b, first_column, group, n, scale_b_row, E8M0_B, ROWS_B, BLOCK_N
                    )
                    term *= scale[None, :]
                total += term
        if GROUP_A == 0:
            scale = load_scales(scale_a, first_row, 0, m, scale_a_row, E8M0_A, ROWS_A, BLOCK_M)
            total *= scale[:, None]
        if GROUP_B == 0:
            scale = load_scales(scale_b, first_column, 0, n, scale_b_row, E8M0_B, ROWS_B, BLOCK_N)
            total *= scale[None, :]
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        in_m, in_n = rows < m, columns < n
        if HAS_BIAS and SPLITS == 1:
            total += tl.load(bias + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
        at = (split.to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
        valid = in_m[:, None] & in_n[None, :]
        if REQUANTIZE == 0:
            tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)
        else:
            store_quantized(
                total, out, out_scales, at, valid, rows, in_m, in_n, column_block, n,
                BLOCK_N, REQUANTIZE, MANTISSA, BIAS, MAX, EMAX, TOP,
            )  # fmt: skip
