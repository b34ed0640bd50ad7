"""What lowbit::dequantize, embedding, codebook_grad, pack and unpack compute, and their fakes; `ops.py` defines the
ops.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit import backends, checks, gradients
from lowbit.forking import alone_after_fork
from lowbit.strides import contiguous, shaped


@alone_after_fork
def dequantize_impl(
    device_type: str,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """lowbit::dequantize on a device."""
    checks.refuse_grad("dequantize", scales, zeros, table)
    checks.check_float("dtype", dtype)
    format = checks.check_weight(spec, layout, n, k, codes.device, codes, scales, zeros, table)
    backend: ModuleType = backends.find_cached(device_type, layout)
    return backend.dequantize(codes, scales, zeros, table, format, n, k, dtype)


@alone_after_fork
def embedding_impl(
    device_type: str,
    indices: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """lowbit::embedding on a device."""
    checks.refuse_grad("embedding", scales, zeros, table)
    checks.check_indices(indices)
    checks.check_float("dtype", dtype)
    format = checks.check_weight(spec, layout, n, k, indices.device, codes, scales, zeros, table)
    rows = contiguous(indices.reshape(-1).to(torch.int64))
    if rows.numel():
        low, high = (int(v) for v in torch.aminmax(rows))
        if low < 0 or high >= n:
            raise IndexError(f"indices must be in [0, {n}), got {low if low < 0 else high}")
    backend: ModuleType = backends.find_cached(device_type, layout)
    y = backend.embedding(rows, codes, scales, zeros, table, format, n, k, dtype)
    return shaped(y, *indices.shape, k)


@alone_after_fork
def codebook_grad_impl(
    device_type: str,
    grad_weight: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """lowbit::codebook_grad on a device."""
    if grad_weight.dtype != torch.float32 or grad_weight.shape != (n, k):
        raise ValueError(
            f"grad_weight must be float32 of shape ({n}, {k}), got {grad_weight.dtype} of shape "
            f"{tuple(grad_weight.shape)}"
        )
    checks.check_weight(spec, layout, n, k, grad_weight.device, codes, scales, zeros, table)
    return gradients.codebook_grad(
        grad_weight, codes, scales, zeros, table, spec, layout, n, k, wanted
    )


@alone_after_fork
def pack_impl(device_type: str, codes: Tensor, spec: str) -> Tensor:
    """lowbit::pack on a device."""
    format = checks.check_codes(codes, spec)
    if codes.numel() and (highest := int(codes.max())) >= format.num_codes:
        raise ValueError(
            f"codes must be below {format.num_codes} in format {format.name!r}, got {highest}"
        )
    return _canonical_packer(device_type).pack(codes, format)


@alone_after_fork
def unpack_impl(device_type: str, packed: Tensor, spec: str, k: int) -> Tensor:
    """lowbit::unpack on a device."""
    format = checks.check_packed(packed, spec, k)
    return _canonical_packer(device_type).unpack(packed, format, k)


def _canonical_packer(device_type: str) -> ModuleType:
    return backends.cpu if device_type == "cpu" else backends.reference


def dequantize_fake(codes: Tensor, *args: Any) -> Tensor:
    """Checks, and an empty result."""
    *tensors, spec, layout, n, k, dtype = args
    checks.refuse_grad("dequantize", *tensors)
    checks.check_float("dtype", dtype)
    checks.check_weight(spec, layout, n, k, codes.device, codes, *tensors)
    return codes.new_empty((n, k), dtype=dtype)


def embedding_fake(indices: Tensor, codes: Tensor, *args: Any) -> Tensor:
    """Checks, and an empty result."""
    *tensors, spec, layout, n, k, dtype = args
    checks.refuse_grad("embedding", *tensors)
    checks.check_indices(indices)
    checks.check_float("dtype", dtype)
    checks.check_weight(spec, layout, n, k, indices.device, codes, *tensors)
    return codes.new_empty((*indices.shape, k), dtype=dtype)


def codebook_grad_fake(grad_weight: Tensor, codes: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Checks, and an empty result."""
    operands, wanted = args[:3], args[-1]
    return tuple(
        torch.empty_like(t) if want else grad_weight.new_empty(0)
        for t, want in zip(operands, wanted, strict=True)
    )


def pack_fake(codes: Tensor, spec: str) -> Tensor:
    """Checks, and an empty result."""
    format = checks.check_codes(codes, spec)
    n, k = codes.shape
    return codes.new_empty((n, format.row_bytes(k)))


def unpack_fake(packed: Tensor, spec: str, k: int) -> Tensor:
    """Checks, and an empty result."""
    checks.check_packed(packed, spec, k)
    return packed.new_empty((packed.shape[0], k))
