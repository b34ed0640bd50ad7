"""What lowbit::linear_outliers computes, its fake, and weights and rows with outliers; `ops.py` defines the op.

Its operands are those of the format without outliers, and the sparse term of the weight beside them: y = x (W + S)^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit import backends, checks, reference
from lowbit.forking import alone_after_fork
from lowbit.strides import contiguous, rows_of, shaped


def linear_outliers_impl(device_type: str, x: Tensor, *args: Any) -> Tensor:
    """lowbit::linear_outliers on a device."""
    *_, gate, residual, _ = args
    checks.refuse_grad("linear_outliers", x, *args[:5], gate, residual)
    return _compute(device_type, x, *args)


def linear_outliers_trainable_impl(device_type: str, x: Tensor, *args: Any) -> Tensor:
    """lowbit::linear_outliers_trainable on a device."""
    return _compute(device_type, x, *args)


def _compute(
    device_type: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    columns: Tensor,
    values: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The sparse product in fp32, then the other, to which it is added before anything is rounded."""
    tensors = (codes, scales, zeros, table)
    format = checks.check_linear(x, *tensors, bias, spec, layout, n, k)
    checks.check_outliers(columns, values, n, k, x.device)
    checks.check_epilogue(x, n, activation, gate, residual)
    bias = contiguous(bias)
    gate, residual = (None if t is None else rows_of(t, n) for t in (gate, residual))
    backend: ModuleType = backends.find_cached(device_type, layout)
    rows = rows_of(x, k)
    sparse = backend.outlier_product(rows, columns, values)
    if activation is None and gate is None:
        sparse = sparse if residual is None else sparse + residual
        y = backend.linear_added(rows, *tensors, bias, format, n, k, sparse, x.dtype)
    else:
        y = backend.linear_added(rows, *tensors, bias, format, n, k, sparse, torch.float32)
        y = reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)
    return shaped(y, *x.shape[:-1], n)


def linear_outliers_fake(x: Tensor, *args: Any) -> Tensor:
    """Checks, and an empty result."""
    *product, columns, values, gate, residual, activation = args
    checks.refuse_grad("linear_outliers", x, *product[:5], gate, residual)
    y = linear_outliers_trainable_fake(x, *product, columns, values)
    checks.check_epilogue(x, product[-2], activation, gate, residual)
    return y


def linear_outliers_trainable_fake(x: Tensor, *args: Any) -> Tensor:
    """Checks, and an empty result."""
    *product, columns, values = args
    n, k = product[-2:]
    checks.check_linear(x, *product)
    checks.check_outliers(columns, values, n, k, x.device)
    return x.new_empty((*x.shape[:-1], n))


@alone_after_fork
def dequantize(
    weight: Sequence[Tensor | None],  # codes, scales, zeros, table
    meaning: Sequence[Any],  # format, layout, n, k
    dtype: torch.dtype,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    decode: Callable[..., Tensor] | None = None,
) -> Tensor:  # (N, K) in `dtype`
    """The weight with its outliers, if it has any, rounded once; `decode` stands in for lowbit::dequantize."""
    decode = decode or torch.ops.lowbit.dequantize.default
    if columns is None or values is None:
        return decode(*weight, *meaning, dtype)
    checks.check_float("dtype", dtype)
    decoded = decode(*weight, *meaning, torch.float32)
    return reference.add_outliers(decoded, columns, values).to(dtype)


@alone_after_fork
def embedding(
    indices: Tensor,  # int64 or int32
    weight: Sequence[Any],  # codes, scales, zeros, table, format, layout, n, k
    dtype: torch.dtype,
    columns: Tensor,
    values: Tensor,
) -> Tensor:  # (*indices.shape, K) in `dtype`
    """Rows of the weight with their outliers, rounded once."""
    checks.check_float("dtype", dtype)
    rows = indices.reshape(-1)
    found = torch.ops.lowbit.embedding.default(rows, *weight, torch.float32)
    found = reference.add_outliers(found, columns[rows], values[rows])
    return shaped(found.to(dtype), *indices.shape, found.shape[1])
