"""Launches the Triton kernel of FP8 products, on CUDA tensors or under Triton's interpreter. No maths and no checks."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.base import num_sms
from lowbit.backends.triton.launch import (
    add_splits,
    interpreted,
    kernels,
    on_device,
    stored,
)
from lowbit.fp8.dtypes import E8M0, FLOAT8
from lowbit.fp8.granularity import Granularity
from lowbit.strides import contiguous, rows_of

REQUANTIZED_GROUP = 16
_ALL_ROWS = 1 << 30  # a multiple of every tile
_logger = logging.getLogger("lowbit")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; (0, 0) under Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


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
        "ROWS_A": granularity_a.rows or _ALL_ROWS, "ROWS_B": granularity_b.rows or _ALL_ROWS,
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
    fp8 = kernels().configs.multiplies_fp8(capability(device), group)
    return None if fp8 else torch.bfloat16


def tma_obstacle(a: Tensor, b: Tensor, group: int) -> str | None:
    """Why pointers, not TMA, load a and b, whose K has unit stride; None if TMA does."""
    matrices = ((t.data_ptr(), t.stride(0)) for t in (a, b))
    why: str | None = kernels().configs.tma_obstacle(capability(a.device), group, *matrices)
    return why


def choose(
    a: Tensor,
    b: Tensor,
    granularity_a: Granularity,
    granularity_b: Granularity,
    quantized: bool,
) -> Any:
    """The tile of a product, `configs.Fp8Config`; `quantized`: of one that is stored in FP8."""
    (m, k), n = a.shape, b.shape[0]
    group = group_of(granularity_a, granularity_b)
    obstacle = tma_obstacle(a, b, group)
    if obstacle is not None and not interpreted(a.device):
        _log_pointers(obstacle)
    return kernels().configs.choose_fp8(
        m,
        n,
        k,
        group,
        capability=capability(a.device),
        sms=num_sms(a.device),
        tma=obstacle is None,
        by_column=by_column(granularity_b),
        quantized=quantized,
    )


@functools.cache
def _log_pointers(why: str) -> None:
    _logger.info("the Triton kernel of FP8 products loads by pointers, not TMA: %s", why)


def describe(c: Any) -> str:
    """The name of the kernel of a tile."""
    loads = "tma" if c.tma else "pointers"
    return f"triton_fp8_mm_{c.block_m}x{c.block_n}x{c.block_k}_{loads}_split{c.splits}"


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
    a, b, bias = rows_of(a, k), rows_of(b, k), contiguous(bias)
    package = kernels()
    constants = meaning(a.dtype, b.dtype, granularity_a, granularity_b)
    constants |= requantization(None if out_scales is None else dtype)
    compute = compute_dtype(group_of(granularity_a, granularity_b), a.device)
    c = config or choose(a, b, granularity_a, granularity_b, out_scales is not None)
    if bias is not None and interpreted(a.device):
        bias = bias.float()
    if compute is not None:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    parts = out if out_scales is None else out.view(torch.uint8)
    if c.splits > 1:
        parts = torch.empty((c.splits, m, n), dtype=torch.float32, device=a.device)
    items = -(-m // c.block_m) * -(-n // c.block_n) * c.splits
    descriptor = package.fp8_mm.descriptor
    with on_device(a.device):
        package.fp8_mm.scaled_mm_kernel[(min(items, c.programs * num_sms(a.device)),)](
            descriptor(a, c.block_m, c.block_k) if c.tma else a,
            descriptor(b, c.block_n, c.block_k) if c.tma else b,
            _scale_values(scale_a),
            _scale_values(scale_b),
            out if bias is None else bias,
            parts,
            out if out_scales is None else out_scales,
            m,
            n,
            k,
            c.k_per_split,
            a.stride(0),
            b.stride(0),
            scale_a.shape[1] if scale_a.dim() else 0,
            scale_b.shape[1] if scale_b.dim() else 0,
            **constants,
            E8M0_A=scale_a.dtype == E8M0,
            E8M0_B=scale_b.dtype == E8M0,
            HAS_BIAS=bias is not None,
            COMPUTE=None if compute is None else package.TYPES[compute],
            TMA=c.tma,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BAND=c.band,
            SPLITS=c.splits,
            num_warps=c.warps,
            num_stages=c.stages,
        )
    if c.splits > 1:
        add_splits(parts, bias, out)


def _scale_values(scale: Tensor) -> Tensor:
    """Scales as the kernel reads them."""
    scale = contiguous(scale)
    return scale.view(torch.uint8) if scale.dtype == E8M0 else scale.float()
