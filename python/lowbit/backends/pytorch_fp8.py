"""FP8 in plain torch, any device: `reference.fp8` as a backend of `backends.fp8`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.float8 import Granularity, Scaled
from lowbit.reference import fp8 as reference
from lowbit.reference.fp8 import absmax, cast

__all__ = ["absmax", "cast", "dequantize", "explain", "quantize", "scaled_mm"]


def quantize(
    x: Tensor,  # (R, K) float
    dtype: torch.dtype,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    transposed: bool = False,
    seed: int | None = None,
    maxima: Tensor | None = None,  # fp32 of scale_shape
) -> tuple[Tensor, Tensor, Tensor | None]:  # (R, K), scales, (K, R) if transposed
    """`reference.quantize`."""
    q, scale = reference.quantize(x, dtype, granularity, scale_dtype, seed, maxima)
    return q, scale, q.t().contiguous() if transposed else None


def dequantize(
    q: Tensor,  # (R, K)
    scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype,
) -> Tensor:  # (R, K) in `dtype`
    """`reference.dequantize`."""
    return reference.dequantize(q, scale, dtype).contiguous()


def scaled_mm(
    a: Scaled,  # (M, K)
    b: Scaled,  # (N, K)
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.scaled_mm`, rounded once to `dtype`."""
    return reference.scaled_mm(a.q, b.q, a.scale, b.scale, bias).to(dtype)


def explain(*_request: object) -> tuple[tuple[str, str | None], ...]:
    """No kernels."""
    return ()
