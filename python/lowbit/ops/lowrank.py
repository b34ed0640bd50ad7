"""lowbit::low_rank_linear: the product with a low-rank term of dense factors, in fp32, to be added to the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import backends, modes, reference
from lowbit.ops import checks, library
from lowbit.strides import contiguous, rows_of, shaped


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:  # (..., N) fp32
    """(x R^T) L^T with fp32 sums, for dense L (N, r) and R (r, K), with gradients for all three."""
    dual = modes.in_dual_level() and not torch.compiler.is_compiling()
    return (_transformed if dual else _low_rank_linear)(x, left, right)


def _check(x: Tensor, left: Tensor, right: Tensor) -> None:
    for name, t in (("x", x), ("left", left), ("right", right)):
        checks.check_float(name, t.dtype)
    if x.dim() == 0:
        raise ValueError(f"x must have shape (..., K), got {tuple(x.shape)}")
    if left.dim() != 2 or right.dim() != 2:
        raise ValueError(f"left and right must be matrices, got {left.dim()}-D and {right.dim()}-D")
    if left.shape[1] != right.shape[0] or right.shape[1] != x.shape[-1]:
        raise ValueError(
            f"left and right must have shapes (N, r) and (r, {x.shape[-1]}), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    for name, t in (("left", left), ("right", right)):
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {t.device}")


def _compute(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _check(x, left, right)
    backend = backends.of_device(x.device.type)
    with checks.no_autocast(x.device.type):
        y = backend.low_rank_linear(rows_of(x, x.shape[-1]), contiguous(left), contiguous(right))
    return shaped(y, *x.shape[:-1], left.shape[0])


def _fake(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _check(x, left, right)
    return x.new_empty((*x.shape[:-1], left.shape[0]), dtype=torch.float32)


def _transformed(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Inside a transform: plain products, which have all derivatives."""
    _check(x, left, right)
    with checks.no_autocast(x.device.type):
        return reference.low_rank_product(x.float(), left, right)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, left, right = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads: list[Tensor | None] = [None, None, None]
    with checks.no_autocast(grad.device.type):
        inner = grad @ left.float()  # (..., r): of x R^T
        rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).float()
        if wanted[0]:
            grads[0] = (inner @ right.float()).to(x.dtype)
        if wanted[1]:
            grads[1] = (rows[0].t() @ (rows[1] @ right.float().t())).to(left.dtype)
        if wanted[2]:
            grads[2] = (inner.reshape(-1, inner.shape[-1]).t() @ rows[1]).to(right.dtype)
    return tuple(grads)


_low_rank_linear = library.op(
    "low_rank_linear",
    "(Tensor x, Tensor left, Tensor right) -> Tensor",
    _compute,
    _fake,
    transform=_transformed,
    derivatives=(_setup_context, _backward),
)
