"""Launches the Triton kernel of FP8 products, on CUDA tensors or under Triton's interpreter. No maths and no checks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.triton import interpreted, kernels, on_device, stored
from lowbit.fp8.dtypes import E8M0, FLOAT8
from lowbit.fp8.granularity import Granularity

# FP8 tensor cores take 32 values of K at least; smaller groups are multiplied in bf16.
_LEAST_FP8_GROUP = 32
REQUANTIZED_GROUP = 16


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    """Whether Triton multiplies FP8 on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def meaning(
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    granularity_a: Granularity,
    granularity_b: Granularity,
) -> dict[str, Any]:
    """What types and granularities say to the kernel, as its constants."""
    a, b = FLOAT8[dtype_a], FLOAT8[dtype_b]
    return {
        "MANTISSA_A": a.mantissa, "BIAS_A": a.bias, "MAX_CODE_A": a.max_code,
        "MANTISSA_B": b.mantissa, "BIAS_B": b.bias, "MAX_CODE_B": b.max_code,
        "ROWS_A": granularity_a.rows or 1, "ROWS_B": granularity_b.rows or 1,
        "GROUP_A": granularity_a.columns or 0, "GROUP_B": granularity_b.columns or 0,
    }  # fmt: skip


def group_of(granularity_a: Granularity, granularity_b: Granularity) -> int:
    """Values along K that share both scales; 0 for all of them."""
    return min((g.columns for g in (granularity_a, granularity_b) if g.columns), default=0)


def by_column(granularity_b: Granularity) -> bool:
    """Whether each row of b, a column of y, has scales of its own for groups along K."""
    return granularity_b.columns is not None and granularity_b.rows == 1


def compute_dtype(group: int, device: torch.device) -> torch.dtype | None:
    """The dtype of the products, None for FP8; all are exact."""
    if interpreted(device):
        return torch.float32
    fits = group == 0 or group >= _LEAST_FP8_GROUP
    return None if fits and _has_fp8(device) else torch.bfloat16


def scaled_mm(
    a: Tensor,  # (M, K), unit stride along K
    b: Tensor,  # (N, K), unit stride along K
    scale_a: Tensor,  # contiguous
    scale_b: Tensor,  # contiguous
    granularity_a: Granularity,
    granularity_b: Granularity,
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
    config: Any = None,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.scaled_mm` in fp32, rounded once to `dtype`; `config` overrides the tile."""
    out = torch.empty((len(a), len(b)), dtype=stored(dtype, a.device), device=a.device)
    _launch(a, b, scale_a, scale_b, granularity_a, granularity_b, bias, out, None, dtype, config)
    return out.to(dtype)


def scaled_mm_quantized(
    a: Tensor,  # (M, K), unit stride along K
    b: Tensor,  # (N, K), unit stride along K
    scale_a: Tensor,  # contiguous
    scale_b: Tensor,  # contiguous
    granularity_a: Granularity,
    granularity_b: Granularity,
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
    config: Any = None,
) -> tuple[Tensor, Tensor]:  # (M, N) in FP8, (M, ceil(N / 16)) fp32
    """`scaled_mm` in fp32, quantized by groups of 1 x 16 before it is stored."""
    m, n = len(a), len(b)
    out = torch.empty((m, n), dtype=dtype, device=a.device)
    scales = torch.empty((m, -(-n // REQUANTIZED_GROUP)), dtype=torch.float32, device=a.device)
    _launch(a, b, scale_a, scale_b, granularity_a, granularity_b, bias, out, scales, dtype, config)
    return out, scales


def requantization(dtype: torch.dtype | None) -> dict[str, Any]:
    """What the FP8 type of y says to the kernel, as its constants; None for a y that is not quantized."""
    f = FLOAT8[dtype or torch.float8_e4m3fn]
    return {
        "REQUANTIZE": 0 if dtype is None else REQUANTIZED_GROUP,
        "MANTISSA": f.mantissa, "BIAS": f.bias, "MAX": f.max, "EMAX": f.emax, "TOP": f.max_code,
    }  # fmt: skip


def _launch(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    granularity_a: Granularity,
    granularity_b: Granularity,
    bias: Tensor | None,
    out: Tensor,
    out_scales: Tensor | None,
    dtype: torch.dtype,
    config: Any,
) -> None:
    (m, k), n = a.shape, b.shape[0]
    if out.numel() == 0:
        return
    package, group = kernels(), group_of(granularity_a, granularity_b)
    compute = compute_dtype(group, a.device)
    c = config or package.configs.choose_fp8(m, n, group, compute is None, by_column(granularity_b))
    if bias is not None and interpreted(a.device):
        bias = bias.float()
    with on_device(a.device):
        package.fp8_mm.scaled_mm_kernel[(-(-m // c.block_m) * -(-n // c.block_n),)](
            a if compute is None else a.view(torch.uint8),
            b if compute is None else b.view(torch.uint8),
            _scale_values(scale_a),
            _scale_values(scale_b),
            out if bias is None else bias,
            out if out_scales is None else out.view(torch.uint8),
            out if out_scales is None else out_scales,
            m,
            n,
            k,
            a.stride(0),
            b.stride(0),
            scale_a.shape[1] if scale_a.dim() else 0,
            scale_b.shape[1] if scale_b.dim() else 0,
            **meaning(a.dtype, b.dtype, granularity_a, granularity_b),
            **requantization(None if out_scales is None else dtype),
            E8M0_A=scale_a.dtype == E8M0,
            E8M0_B=scale_b.dtype == E8M0,
            HAS_BIAS=bias is not None,
            COMPUTE=None if compute is None else package.TYPES[compute],
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BAND=c.band,
            num_warps=c.warps,
            num_stages=c.stages,
        )


def _scale_values(scale: Tensor) -> Tensor:
    """Scales as the kernel reads them."""
    return scale.view(torch.uint8) if scale.dtype == E8M0 else scale.float()
