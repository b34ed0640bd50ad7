"""Launches the Triton kernel of FP8 products, on CUDA tensors or under Triton's interpreter. No maths and no checks."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.base import num_sms
from lowbit.backends.triton.fp8 import constants
from lowbit.backends.triton.launch import (
    add_splits,
    empty,
    interpreted,
    kernels,
    on_device,
    readable,
)
from lowbit.float8 import E8M0, FLOAT8, Granularity, Scaled
from lowbit.strides import contiguous, rows_of

NAME = "triton_fp8_mm"  # what `explain` calls the kernel
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
    made: dict[str, Any] = {}
    for side, dtype, g in (("A", dtype_a, granularity_a), ("B", dtype_b, granularity_b)):
        each = constants(dtype, "mantissa", "bias", "max_code")
        each |= {"ROWS": g.rows or _ALL_ROWS, "GROUP": g.columns or 0}
        made |= {f"{name}_{side}": value for name, value in each.items()}
    return made


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


def choose(a: Scaled, b: Scaled, quantized: bool) -> Any:
    """The tile of a product, `configs.Fp8Config`; `quantized`: of one that is stored in FP8."""
    (m, k), n, device = a.q.shape, len(b.q), a.q.device
    group = group_of(a.granularity, b.granularity)
    obstacle = tma_obstacle(a.q, b.q, group)
    if obstacle is not None and not interpreted(device):
        _log_pointers(obstacle)
    return kernels().configs.choose_fp8(
        m,
        n,
        k,
        group,
        capability=capability(device),
        sms=num_sms(device),
        tma=obstacle is None,
        by_column=by_column(b.granularity),
        quantized=quantized,
    )


@functools.cache
def _log_pointers(why: str) -> None:
    _logger.info("the Triton kernel of FP8 products loads by pointers, not TMA: %s", why)


def explain(a: Scaled, b: Scaled, quantized: bool) -> tuple[tuple[str, str | None], ...]:
    """The kernel with TMA and, where that cannot be, why, and the one with pointers; the last one runs."""
    obstacle = tma_obstacle(a.q, b.q, group_of(a.granularity, b.granularity))
    c = choose(a, b, quantized)
    loads = "tma" if c.tma else "pointers"
    name = f"{NAME}_{c.block_m}x{c.block_n}x{c.block_k}_{loads}_split{c.splits}"
    return ((name, None),) if obstacle is None else ((f"{NAME}_tma", obstacle), (name, None))


def scaled_mm(
    a: Scaled,  # (M, K), unit stride along K
    b: Scaled,  # (N, K), unit stride along K
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
    config: Any = None,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.scaled_mm` in fp32, rounded once to `dtype`; `config` overrides the tile."""
    out = empty((len(a.q), len(b.q)), dtype, a.q.device)
    _launch(a, b, bias, out, None, dtype, config)
    return out.to(dtype)


def scaled_mm_quantized(
    a: Scaled,  # (M, K), unit stride along K
    b: Scaled,  # (N, K), unit stride along K
    bias: Tensor | None,  # (N,)
    dtype: torch.dtype,
    config: Any = None,
) -> tuple[Tensor, Tensor]:  # (M, N) in FP8, (M, ceil(N / 16)) fp32
    """`scaled_mm` in fp32, quantized by groups of 1 x 16 before it is stored."""
    m, n, device = len(a.q), len(b.q), a.q.device
    out = torch.empty((m, n), dtype=dtype, device=device)
    scales = torch.empty((m, -(-n // REQUANTIZED_GROUP)), dtype=torch.float32, device=device)
    _launch(a, b, bias, out, scales, dtype, config)
    return out, scales


def requantization(dtype: torch.dtype | None) -> dict[str, Any]:
    """What the FP8 type of y says to the kernel, as its constants; None for a y that is not quantized."""
    fp8 = dtype or torch.float8_e4m3fn
    return {
        "REQUANTIZE": 0 if dtype is None else REQUANTIZED_GROUP,
        **constants(fp8, "mantissa", "bias", "max", "emax"),
        "TOP": FLOAT8[fp8].max_code,
    }


def _launch(
    a: Scaled,
    b: Scaled,
    bias: Tensor | None,
    out: Tensor,
    out_scales: Tensor | None,
    dtype: torch.dtype,
    config: Any,
) -> None:
    (m, k), n, device = a.q.shape, len(b.q), a.q.device
    if out.numel() == 0:
        return
    a, b = (s._replace(q=rows_of(s.q, k)) for s in (a, b))
    bias = None if bias is None else readable(contiguous(bias))
    package = kernels()
    said = meaning(a.q.dtype, b.q.dtype, a.granularity, b.granularity)
    said |= requantization(None if out_scales is None else dtype)
    compute = compute_dtype(group_of(a.granularity, b.granularity), device)
    c = config or choose(a, b, out_scales is not None)
    codes = [s.q if compute is None else s.q.view(torch.uint8) for s in (a, b)]
    parts = out if out_scales is None else out.view(torch.uint8)
    if c.splits > 1:
        parts = torch.empty((c.splits, m, n), dtype=torch.float32, device=device)
    items = -(-m // c.block_m) * -(-n // c.block_n) * c.splits
    if c.tma:
        blocks = (c.block_m, c.block_n)
        codes = [
            package.fp8_matmul.descriptor(t, rows, c.block_k)
            for t, rows in zip(codes, blocks, strict=True)
        ]
    with on_device(device):
        package.fp8_matmul.scaled_mm_kernel[(min(items, c.programs * num_sms(device)),)](
            *codes,
            _scale_values(a.scale),
            _scale_values(b.scale),
            out if bias is None else bias,
            parts,
            out if out_scales is None else out_scales,
            m,
            n,
            k,
            c.k_per_split,
            a.q.stride(0),
            b.q.stride(0),
            a.scale.shape[1] if a.scale.dim() else 0,
            b.scale.shape[1] if b.scale.dim() else 0,
            **said,
            E8M0_A=a.scale.dtype == E8M0,
            E8M0_B=b.scale.dtype == E8M0,
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
