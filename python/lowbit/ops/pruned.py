"""lowbit::pruned_linear: the product with a pruned weight, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import backends, modes, reference
from lowbit.layouts import PrunedOperands, pruned_operands
from lowbit.ops import checks, library
from lowbit.strides import rows_of, shaped
from lowbit.weights.pruned import PrunedTensor

_ROWS = 1024  # of the weight's gradient that are made at a time


def operands_of(weight: PrunedTensor) -> PrunedOperands:
    """The weight as kernels read it, made once and kept."""
    if weight._packed is None:
        weight._packed = pruned_operands(weight)
    return weight._packed  # type: ignore[return-value]


def pruned_linear(x: Tensor, w: PrunedOperands) -> Tensor:  # (..., N) fp32
    """x W^T in fp32, with derivatives for x and the table."""
    dual = modes.in_dual_level() and not torch.compiler.is_compiling()
    return (_transformed if dual else _pruned_linear)(x, *w)


def _check(x: Tensor, entries: Tensor, starts: Tensor, table: Tensor, n: int) -> None:
    checks.check_float("x", x.dtype)
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape (..., K), got {tuple(x.shape)}")
    if entries.dtype != torch.uint8 or starts.dtype != torch.int64 or table.dtype != torch.float32:
        raise TypeError(
            "entries must be uint8, starts int64 and table float32, got "
            f"{entries.dtype}, {starts.dtype} and {table.dtype}"
        )
    size = entries.shape[2] if entries.dim() == 3 else 0
    if entries.dim() != 3 or entries.shape[1:] != (2, 16):
        raise ValueError(f"entries must have shape (steps, 2, 16), got {tuple(entries.shape)}")
    if n < 1 or starts.shape != (-(-n // size) + 1,):
        raise ValueError(
            f"starts of {n} rows must have shape ({-(-n // size) + 1},), got {tuple(starts.shape)}"
        )
    if table.dim() != 1 or table.shape[0] not in [2**bits for bits in range(1, 9)]:
        raise ValueError(
            f"table must have 2 to 256 entries, a power of two, got {tuple(table.shape)}"
        )
    for name, t in (("entries", entries), ("starts", starts), ("table", table)):
        if t.device != x.device or not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous on {x.device}, got strides {t.stride()} on {t.device}"
            )


def _compute(x: Tensor, entries: Tensor, starts: Tensor, table: Tensor, n: int) -> Tensor:
    _check(x, entries, starts, table, n)
    backend = backends.of_device(x.device.type)
    with checks.no_autocast(x.device.type):
        y = backend.pruned_linear(
            rows_of(x, x.shape[-1]), PrunedOperands(entries, starts, table, n)
        )
    return shaped(y, *x.shape[:-1], n)


def _fake(x: Tensor, entries: Tensor, starts: Tensor, table: Tensor, n: int) -> Tensor:
    _check(x, entries, starts, table, n)
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


def _transformed(x: Tensor, entries: Tensor, starts: Tensor, table: Tensor, n: int) -> Tensor:
    """Inside a transform: the dense product, which has all derivatives."""
    return reference.pruned_product(x.float(), entries, starts, table, n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, entries, starts, table, n = inputs
    ctx.save_for_backward(x if table.requires_grad else None, entries, starts, table)
    ctx.n, ctx.k, ctx.dtype = n, x.shape[-1], x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, entries, starts, table = ctx.saved_tensors
    grad_x = grad_table = None
    with checks.no_autocast(grad.device.type):
        if ctx.needs_input_grad[0]:
            weight = reference.pruned_weight(entries, starts, table, ctx.n, ctx.k)
            grad_x = (grad @ weight).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            rows, columns, codes = reference.pruned_places(entries, starts, ctx.n, ctx.k)
            y, values = grad.reshape(-1, ctx.n), x.reshape(-1, ctx.k).float()
            grad_table = torch.zeros_like(table)
            for begin in range(0, ctx.n, _ROWS):
                mine = (rows >= begin) & (rows < begin + _ROWS)
                dense = y[:, begin : begin + _ROWS].t() @ values
                grad_table.index_add_(0, codes[mine], dense[rows[mine] - begin, columns[mine]])
    return grad_x, None, None, grad_table, None


_pruned_linear = library.op(
    "pruned_linear",
    "(Tensor x, Tensor entries, Tensor starts, Tensor table, int n) -> Tensor",
    _compute,
    _fake,
    transform=_transformed,
    derivatives=(_setup_context, _backward),
)
