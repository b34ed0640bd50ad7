"""Hands CPU tensors to the compiled FP8 kernels. No maths and no checks; `isa` caps the instruction set, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import CODES
from lowbit.float8 import E8M0, Granularity
from lowbit.strides import address, address_of_rows

# csrc/cpu/fp8/fp8.h
TYPES = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, E8M0: 2}


def blocks(granularity: Granularity, rows: int, k: int) -> tuple[int, int, int, int, int]:
    """csrc/cpu/fp8/fp8.h Fp8Blocks."""
    if granularity.rows is None:
        return rows, k, 1, k, 0
    shape = granularity.scale_shape(rows, k)
    return rows, k, *granularity.block(rows, k), shape[1]


def absmax(
    x: Tensor,  # (R, K) float, unit stride along K
    granularity: Granularity,
    isa: str = "",
) -> Tensor:  # fp32 of scale_shape
    """`reference.absmax` of at least one element."""
    out = torch.empty(granularity.scale_shape(*x.shape), dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.fp8_maxima_ptr(
        blocks(granularity, *x.shape),
        x_address,
        CODES[x.dtype],
        x_stride,
        address(out),
        torch.get_num_threads(),
        isa,
    )
    return out


def quantize(
    x: Tensor,  # (R, K) float, unit stride along K
    dtype: torch.dtype,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    transposed: bool = False,
    seed: int | None = None,
    maxima: Tensor | None = None,  # fp32 of scale_shape, contiguous
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:  # (R, K), scales, (K, R) if transposed
    """`reference.quantize` of at least one element."""
    rows, k = x.shape
    q = torch.empty((rows, k), dtype=dtype, device="cpu")
    q_t = torch.empty((k, rows), dtype=dtype, device="cpu") if transposed else None
    scale = torch.empty(granularity.scale_shape(rows, k), dtype=scale_dtype, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.fp8_quantize_ptr(
        blocks(granularity, rows, k),
        x_address,
        CODES[x.dtype],
        x_stride,
        TYPES[dtype],
        SCALE_TYPES[scale_dtype],
        address(maxima),
        address(scale),
        address(q),
        address(q_t),
        seed is not None,
        seed or 0,
        torch.get_num_threads(),
        isa,
    )
    return q, scale, q_t


def dequantize(
    q: Tensor,  # (R, K) contiguous
    scale: Tensor,  # contiguous
    granularity: Granularity,
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:  # (R, K) in `dtype`
    """`reference.dequantize` of at least one element."""
    out = torch.empty(q.shape, dtype=dtype, device="cpu")
    _C.fp8_dequantize_ptr(
        blocks(granularity, *q.shape),
        address(q),
        TYPES[q.dtype],
        address(scale),
        SCALE_TYPES[scale.dtype],
        address(out),
        CODES[dtype],
        torch.get_num_threads(),
        isa,
    )
    return out


def cast(
    x: Tensor,  # float, contiguous
    dtype: torch.dtype,
    saturate: bool,
    isa: str = "",
) -> Tensor:  # the shape of x
    """`reference.cast`."""
    q = torch.empty(x.shape, dtype=dtype, device="cpu")
    _C.fp8_cast_ptr(
        address(x),
        CODES[x.dtype],
        x.numel(),
        TYPES[dtype],
        saturate,
        address(q),
        torch.get_num_threads(),
        isa,
    )
    return q
