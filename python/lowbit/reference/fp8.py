"""The only truth of FP8: quantize, dequantize, cast and scaled_mm in plain torch, on any device.

Arithmetic is fp32 with one rounding per operation, in the order that is written here; `scaled_mm` is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.float8 import (
    E8M0,
    FLOAT8,
    NAN_CODE,
    Granularity,
    e8m0_values,
    infer_granularity,
)

_WORD = 0xFFFFFFFF


def cast(x: Tensor, dtype: torch.dtype, saturate: bool = True) -> Tensor:
    """To the nearest FP8 value, ties to even: torch's own cast, apart from overflow, which depends on its version."""
    x, f = x.float(), FLOAT8[dtype]
    q = x.clamp(-f.max, f.max).to(dtype)
    if saturate:
        return q
    overflow = f.overflow_code | x.signbit().to(torch.uint8) << 7
    return torch.where(x.abs() >= f.overflow, overflow, q.view(torch.uint8)).view(dtype)


def absmax(x: Tensor, granularity: Granularity) -> Tensor:  # (R, K) float to fp32 of scale_shape
    """The largest |x| of every block; NaN where there is one, 0 where there is nothing."""
    rows, k = x.shape
    shape = granularity.scale_shape(rows, k)
    if not x.numel():
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    block_rows, block_k = granularity.block(rows, k)
    padded = F.pad(x.float().abs(), (0, -k % block_k, 0, -rows % block_rows))
    blocks = padded.view(-(-rows // block_rows), block_rows, -(-k // block_k), block_k)
    return blocks.amax((1, 3)).view(shape)


def make_scale(absmax: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> Tensor:
    """Scales for blocks of these fp32 maxima.

    absmax / FP8_MAX, in bf16 rounded up, so that nothing saturates; 1 where that is 0. E8M0 takes the exponent
    floor(log2(absmax)) - emax, at least -127, and is NaN where absmax is not finite.
    """
    f = FLOAT8[dtype]
    if scale_dtype == E8M0:
        exponent = absmax.contiguous().view(torch.int32) >> 23
        code = (exponent - f.emax).clamp(min=0)
        return torch.where(absmax.isfinite(), code, 255).to(torch.uint8).view(E8M0)
    # A tensor: a division by a number may multiply with its rounded reciprocal.
    scale = absmax / torch.full_like(absmax, f.max)
    if scale_dtype == torch.bfloat16:
        up = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        scale = torch.where(scale.isfinite(), up, scale)
    return torch.where(scale == 0, 1, scale).to(scale_dtype)


def scale_values(scale: Tensor) -> Tensor:
    """Scales in fp32, exact."""
    return e8m0_values(scale) if scale.dtype == E8M0 else scale.to(torch.float32)


def expand(scale: Tensor, granularity: Granularity, rows: int, k: int) -> Tensor:  # (R, K) fp32
    """The scale of every element."""
    values = scale_values(scale)
    if not values.dim():
        return values.expand(rows, k)
    block_rows, block_k = granularity.block(rows, k)
    by_row = values.repeat_interleave(block_rows, 0)[:rows]
    return by_row.repeat_interleave(block_k, 1)[:, :k]


def quantize(
    x: Tensor,  # (..., K) float
    dtype: torch.dtype,
    granularity: Granularity,
    scale_dtype: torch.dtype | None = None,
    seed: int | None = None,
    maxima: Tensor | None = None,  # fp32 of scale_shape; by default those of x
) -> tuple[Tensor, Tensor]:  # (..., K) FP8, scales
    """q = cast(x / scale), saturating; to nearest even, or stochastic with a seed. NaN has the code 0x7F."""
    n, k = x.shape[:-1].numel(), x.shape[-1]
    rows = x.reshape(n, k).float()
    maxima = absmax(rows, granularity) if maxima is None else maxima.abs()
    scale = make_scale(maxima, dtype, scale_dtype or granularity.scale_dtypes[0])
    ratio = rows / expand(scale, granularity, n, k)
    if seed is None:
        # One NaN for all: that of inf / inf has a sign of its own on every machine.
        q = cast(torch.where(ratio.isnan(), torch.nan, ratio), dtype)
    else:
        q = _round_stochastic(ratio, dtype, noise(seed, n, k, x.device))
    return q.view(x.shape), scale


def noise(seed: int, rows: int, k: int, device: torch.device | None = None) -> Tensor:
    """(rows, k) int64 in [0, 2^32): a hash of the seed (64 bits), the row and the column.

    h(h(column ^ a) + b) with a = h(row + h(seed_high ^ h(seed_low))), b = h(a ^ 0x9e3779b9), and h the mixer
    "lowbias32" (Wellons, hash prospector).
    """
    low, high = (torch.tensor(seed >> s & _WORD, dtype=torch.int64, device=device) for s in (0, 32))
    row, column = (torch.arange(n, dtype=torch.int64, device=device) for n in (rows, k))
    a = _mix(row + _mix(high ^ _mix(low)) & _WORD)[:, None]
    b = _mix(a ^ 0x9E3779B9)
    return _mix(_mix(column ^ a) + b & _WORD)


def _mix(h: Tensor) -> Tensor:  # int64 in [0, 2^32)
    h = (h ^ h >> 16) * 0x7FEB352D & _WORD
    h = (h ^ h >> 15) * 0x846CA68B & _WORD
    return h ^ h >> 16


def _round_stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Adds noise that is uniform in one step of the FP8 type, in 2^-20 (E5M2: 2^-21) of it, and cuts off."""
    f = FLOAT8[dtype]
    dropped = 23 - f.mantissa
    magnitude = x.abs()
    uniform = noise >> (32 - dropped)
    normal = magnitude.view(torch.int32).long() + uniform >> dropped
    normal -= (127 - f.bias) << f.mantissa
    # Below the smallest normal value: steps of 2^(1 - bias - mantissa), as integers with `dropped` fractional bits.
    fixed = (magnitude * 2.0 ** (f.bias - 1 + f.mantissa + dropped)).long()
    code = torch.where(magnitude < f.min_normal, fixed + uniform >> dropped, normal)
    code = code.clamp(max=f.max_code) | x.signbit().long() << 7
    return torch.where(x.isnan(), NAN_CODE, code).to(torch.uint8).view(dtype)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale in fp32, rounded once to `dtype`."""
    k = q.shape[-1]
    rows = q.shape[:-1].numel()
    g = infer_granularity(scale, rows, k)
    values = q.float().reshape(rows, k) * expand(scale, g, rows, k)
    return values.to(dtype).view(q.shape)


def scaled_mm(
    a: Tensor,  # (M, K) FP8
    b: Tensor,  # (N, K) FP8
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (M, N) float64
    """(a * scale_a) (b * scale_b)^T + bias, all of it in float64."""
    wide = []
    for name, t, scale in (("scale_a", a, scale_a), ("scale_b", b, scale_b)):
        rows, k = t.shape
        g = infer_granularity(scale, rows, k, name)
        wide.append(t.double() * expand(scale, g, rows, k).double())
    y = wide[0] @ wide[1].T
    return y if bias is None else y + bias.double()
