"""FP8: maxima of blocks, quantize, dequantize and cast, bit for bit as `lowbit.reference.fp8` states them.

FP8 codes and E8M0 scales are bytes here, bf16 scales their bits, so nothing depends on what types a GPU has.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_F32, SCALE_BF16, SCALE_E8M0 = (tl.constexpr(i) for i in range(3))
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_NAN_CODE = tl.constexpr(0x7F)


@triton.jit
def as_bits(v):
    """fp32 to the int32 of the same bits."""
    return v.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """int32 to the fp32 of the same bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def block_maxima(bits, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 bits of the largest |value| of each block of a tile of fp32 bits; NaN is above all others."""
    tall: tl.constexpr = bits.shape[0] // BLOCK_ROWS
    wide: tl.constexpr = bits.shape[1] // BLOCK_K
    blocks = tl.reshape(bits & 0x7FFFFFFF, (tall, BLOCK_ROWS, wide, BLOCK_K))
    return tl.max(tl.max(blocks, 3), 1)


@triton.jit
def by_element(blocks, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile with every block filled with its value."""
    tall: tl.constexpr = blocks.shape[0]
    wide: tl.constexpr = blocks.shape[1]
    filled = tl.broadcast_to(blocks[:, None, :, None], (tall, BLOCK_ROWS, wide, BLOCK_K))
    return tl.reshape(filled, (tall * BLOCK_ROWS, wide * BLOCK_K))


@triton.jit
def scale_bits(maxima, MAX: tl.constexpr, EMAX: tl.constexpr, SCALE: tl.constexpr):
    """fp32 bits of the scales of blocks with these maxima (bits), rounded to what SCALE stores."""
    if SCALE == SCALE_E8M0:
        code = tl.minimum(tl.maximum((maxima >> 23) - EMAX, 0), 254)
        bits = tl.where(code == 0, 1 << 22, code << 23)  # 2^-127 is subnormal
        bits = tl.where(maxima >= _INFINITY, _NAN, bits)
    else:
        bits = as_bits(tl.div_rn(as_float(maxima), tl.full(maxima.shape, MAX, tl.float32)))
        if SCALE == SCALE_BF16:
            bits = (tl.minimum(bits, _NAN) + 0xFFFF) & -65536
        bits = tl.where(bits == 0, 0x3F800000, bits)
    return bits


@triton.jit
def mix(h):
    """uint32 "lowbias32" (Wellons, hash prospector)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def noise(seed_low, seed_high, rows, columns):
    """(rows, columns) uint32: a hash of the seed and the place."""
    key = mix(seed_high.to(tl.uint32) ^ mix(seed_low.to(tl.uint32)))
    a = mix(rows.to(tl.uint32) + key)[:, None]
    b = mix(a ^ 0x9E3779B9)
    return mix(mix(columns.to(tl.uint32)[None, :] ^ a) + b)


@triton.jit
def with_sign(code, bits, magnitude, NAN_SIGN: tl.constexpr):
    """`code` with the sign of `bits`; NaN has one if NAN_SIGN."""
    sign = (bits >> 24) & 0x80
    if NAN_SIGN:
        signed = tl.where(magnitude > _INFINITY, _NAN_CODE, code) | sign
    else:
        signed = tl.where(magnitude > _INFINITY, _NAN_CODE, code | sign)
    return signed.to(tl.uint8)


@triton.jit
def encode(
    v, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, NAN_SIGN: tl.constexpr
):
    """fp32 to the nearest code, ties to even; TOP is the code of all that is larger than those below it."""
    dropped: tl.constexpr = 23 - MANTISSA
    step: tl.constexpr = (
        127 - BIAS + 24 - MANTISSA
    ) << 23  # the float whose last bit is the subnormal step
    bits = as_bits(v)
    magnitude = bits & 0x7FFFFFFF
    up = magnitude + ((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)
    normal = (up >> dropped) - ((127 - BIAS) << MANTISSA)
    subnormal = as_bits(as_float(magnitude) + as_float(tl.full(bits.shape, step, tl.int32))) - step
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    return with_sign(tl.minimum(code, TOP), bits, magnitude, NAN_SIGN)


@triton.jit
def encode_stochastic(v, uniform, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr):
    """fp32 to a code: uniform noise (uint32) is added to what the code drops, the rest is cut off."""
    dropped: tl.constexpr = 23 - MANTISSA
    bits = as_bits(v)
    magnitude = bits & 0x7FFFFFFF
    small = magnitude < ((128 - BIAS) << 23)
    added = (uniform >> (32 - dropped)).to(tl.int32)
    normal = ((magnitude + added) >> dropped) - ((127 - BIAS) << MANTISSA)
    steps = as_float(tl.where(small, magnitude, 0)) * (2.0 ** (BIAS - 1 + MANTISSA + dropped))
    subnormal = (steps.to(tl.int32) + added) >> dropped
    code = tl.minimum(tl.where(small, subnormal, normal), TOP)
    return with_sign(code, bits, magnitude, False)


@triton.jit
def decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MAX_CODE: tl.constexpr):
    """Codes (int32) to fp32."""
    dropped: tl.constexpr = 23 - MANTISSA
    rebias: tl.constexpr = (127 - BIAS) << 23
    least: tl.constexpr = (128 - BIAS) << 23  # bits of the smallest normal value
    magnitude = code & 0x7F
    normal = (magnitude << dropped) + rebias
    one = as_float(tl.full(code.shape, least, tl.int32))
    subnormal = as_bits(as_float((magnitude << dropped) + least) - one)
    finite = tl.where(magnitude < (1 << MANTISSA), subnormal, normal)
    bits = tl.where(magnitude > MAX_CODE, normal + rebias, finite)
    return as_float(bits | ((code & 0x80) << 24))


@triton.jit
def maxima_kernel(
    x,  # (rows, k)
    out,  # (ceil(rows / BLOCK_ROWS), columns) int32: fp32 bits
    rows,
    k,
    x_row,
    x_column,
    columns,  # ceil(k / BLOCK_K)
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Maxima of whole blocks, a tile of them for each program."""
    tall: tl.constexpr = TILE_ROWS // BLOCK_ROWS
    wide: tl.constexpr = TILE_K // BLOCK_K
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    valid = (r < rows)[:, None] & (c < k)[None, :]
    at = r.to(tl.int64)[:, None] * x_row + c.to(tl.int64)[None, :] * x_column
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    maxima = block_maxima(as_bits(v), BLOCK_ROWS, BLOCK_K)
    block_r = tl.program_id(0) * tall + tl.arange(0, tall)
    block_c = tl.program_id(1) * wide + tl.arange(0, wide)
    inside = (block_r < tl.cdiv(rows, BLOCK_ROWS))[:, None] & (block_c < columns)[None, :]
    tl.store(out + block_r.to(tl.int64)[:, None] * columns + block_c[None, :], maxima, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def quantize_kernel(
    x,  # (rows, k)
    maxima,  # int32 bits of the fp32 maxima of the blocks; read if HAS_MAXIMA
    scales,
    q,  # (rows, k)
    q_t,  # (k, rows); written if TRANSPOSED
    rows,
    k,
    x_row,
    x_column,
    columns,  # blocks in a row; 0 if all rows share one
    seed_low,
    seed_high,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    EMAX: tl.constexpr,
    TOP: tl.constexpr,
    SCALE: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """A tile of whole blocks; ONE_COLUMN: blocks span rows, and a tile that does not needs HAS_MAXIMA."""
    tall: tl.constexpr = TILE_ROWS // BLOCK_ROWS
    wide: tl.constexpr = TILE_K // BLOCK_K
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    valid = (r < rows)[:, None] & (c < k)[None, :]
    at = r.to(tl.int64)[:, None] * x_row + c.to(tl.int64)[None, :] * x_column
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    block_r = tl.program_id(0) * tall + tl.arange(0, tall)
    block_c = tl.program_id(1) * wide + tl.arange(0, wide)
    inside = (block_r < tl.cdiv(rows, BLOCK_ROWS))[:, None]
    if ONE_COLUMN:
        first = inside & (block_c == 0)[None, :]
        block_c *= 0
        if columns == 0:
            first &= (block_r == 0)[:, None]
    else:
        inside &= (block_c < columns)[None, :]
        first = inside
    place = block_r.to(tl.int64)[:, None] * columns + block_c[None, :]
    if HAS_MAXIMA:
        largest = tl.load(maxima + place, mask=inside, other=0) & 0x7FFFFFFF
    else:
        largest = block_maxima(as_bits(v), BLOCK_ROWS, BLOCK_K)
    scale = scale_bits(largest, MAX, EMAX, SCALE)
    # A scale that tiles share is written once.
    if SCALE == SCALE_F32:
        tl.store(scales + place, as_float(scale), mask=first)
    elif SCALE == SCALE_BF16:
        tl.store(scales + place, (scale >> 16).to(tl.int16), mask=first)
    else:
        tl.store(scales + place, (scale >> 23).to(tl.uint8), mask=first)
    ratio = tl.div_rn(v, as_float(by_element(scale, BLOCK_ROWS, BLOCK_K)))
    if STOCHASTIC:
        codes = encode_stochastic(ratio, noise(seed_low, seed_high, r, c), MANTISSA, BIAS, TOP)
    else:
        codes = encode(ratio, MANTISSA, BIAS, TOP, False)
    tl.store(q + r.to(tl.int64)[:, None] * k + c[None, :], codes, mask=valid)
    if TRANSPOSED:
        to = q_t + c.to(tl.int64)[:, None] * rows + r[None, :]
        tl.store(to, tl.trans(codes), mask=tl.trans(valid))


@triton.jit
def dequantize_kernel(
    q,  # (rows, k)
    scales,
    out,  # (rows, k)
    rows,
    k,
    block_rows,
    block_k,
    columns,  # blocks in a row; 0 if all rows share one
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MAX_CODE: tl.constexpr,
    SCALE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """q * scale in fp32, rounded once."""
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    valid = (r < rows)[:, None] & (c < k)[None, :]
    at = r.to(tl.int64)[:, None] * k + c[None, :]
    codes = tl.load(q + at, mask=valid, other=0).to(tl.int32)
    place = (r // block_rows).to(tl.int64)[:, None] * columns + (c // block_k)[None, :]
    if SCALE == SCALE_E8M0:
        exponent = tl.load(scales + place, mask=valid, other=127).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = as_float(tl.where(exponent == 255, _NAN, bits))
    else:
        scale = tl.load(scales + place, mask=valid, other=1.0).to(tl.float32)
    values = decode(codes, MANTISSA, BIAS, MAX_CODE) * scale
    tl.store(out + at, values.to(out.dtype.element_ty), mask=valid)


@triton.jit
def cast_kernel(
    x,  # (size,)
    q,  # (size,)
    size,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """To the nearest code; what is too large becomes TOP."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    v = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(q + at, encode(v, MANTISSA, BIAS, TOP, True), mask=valid)
