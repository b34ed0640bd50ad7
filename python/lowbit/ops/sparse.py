"""lowbit::sparse_linear: the product with the sparse term of a weight, in fp32, to be added to the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import backends, modes, reference
from lowbit.ops import checks, library
from lowbit.strides import rows_of, shaped
from lowbit.weights.sparse import SparseTerm


def _check(x: Tensor, columns: Tensor, values: Tensor) -> None:
    checks.check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError(f"x must have shape (..., K), got {tuple(x.shape)}")
    checks.check_sparse(columns, values, x.shape[-1], x.device)
    checks.refuse_grad("sparse_linear", values)


def _compute(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    _check(x, columns, values)
    backend = backends.of_device(x.device.type)
    y = backend.sparse_linear(rows_of(x, x.shape[-1]), SparseTerm(columns, values))
    return shaped(y, *x.shape[:-1], columns.shape[0])


def _fake(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    _check(x, columns, values)
    return x.new_empty((*x.shape[:-1], columns.shape[0]), dtype=torch.float32)


def dense(columns: Tensor, values: Tensor, k: int, dtype: torch.dtype) -> Tensor:  # (N, K)
    """The sparse term as a matrix."""
    zeros = values.new_zeros((columns.shape[0], k), dtype=torch.float32)
    return reference.add_outliers(zeros, columns, values).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, columns, values = inputs
    ctx.save_for_backward(columns, values)
    ctx.k, ctx.dtype = x.shape[-1], x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    columns, values = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        with checks.no_autocast(grad.device.type):
            grad_x = (grad @ dense(columns, values, ctx.k, grad.dtype)).to(ctx.dtype)
    return grad_x, None, None


def _transformed(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Inside a transform: the dense product, which has all derivatives."""
    return x.float() @ dense(columns, values, x.shape[-1], torch.float32).t()


def sparse_linear(x: Tensor, term: SparseTerm) -> Tensor:  # (..., N) fp32
    """x S^T in fp32, with derivatives for x."""
    dual = modes.in_dual_level() and not torch.compiler.is_compiling()
    return (_transformed if dual else _sparse_linear)(x, *term)


_sparse_linear = library.op(
    "sparse_linear",
    "(Tensor x, Tensor outlier_columns, Tensor outlier_values) -> Tensor",
    _compute,
    _fake,
    transform=_transformed,
    derivatives=(_setup_context, _backward),
)
