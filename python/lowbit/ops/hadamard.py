"""lowbit::hadamard: the randomized Hadamard transform of the last dimension, its transpose, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import backends, modes, reference
from lowbit.ops import checks, library
from lowbit.strides import contiguous, rows_of, shaped


def hadamard(x: Tensor, signs: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, with fp32 sums, rounded once to the dtype of x.

    y = H (signs * x), or with `transposed` y = signs * (H^T x), which undoes it for signs of 1 and -1. Random signs
    make the numbers of a row alike in size, whatever they were (QuIP#, https://arxiv.org/abs/2402.04396). K is a power
    of two times the order of a Paley matrix: 576, 640, 896, 1536, 4864 and 11008 are.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        signs: (K,) floats, usually 1 and -1; any numbers, which get gradients; None for all 1.
        transposed: the transpose.

    Returns:
        (..., K) in the dtype of x.

    Raises:
        ValueError: there is no Hadamard matrix of order K, or signs have another shape or device.
        TypeError: a dtype is none of the three.

    Example:
        >>> x, signs = torch.randn(2, 576), torch.randint(0, 2, (576,)) * 2.0 - 1
        >>> back = hadamard(hadamard(x, signs), signs, transposed=True)  # x
    """
    checks.check_tensors(x=x)
    checks.check_optional(signs=signs)
    dual = modes.in_dual_level() and not torch.compiler.is_compiling()
    return (_transformed if dual else _hadamard)(x, signs, transposed)


def _check(x: Tensor, signs: Tensor | None) -> None:
    checks.check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError(f"x must have shape (..., K), got {tuple(x.shape)}")
    k = x.shape[-1]
    if isinstance(k, int):
        reference.hadamard_order(k)
    if signs is None:
        return
    checks.check_float("signs", signs.dtype)
    if signs.dim() != 1 or signs.shape[0] != k or signs.device != x.device:
        raise ValueError(
            f"signs must have shape ({k},) on {x.device}, got {tuple(signs.shape)} on {signs.device}"
        )


def _compute(x: Tensor, signs: Tensor | None, transposed: bool) -> Tensor:
    _check(x, signs)
    rows = rows_of(x, x.shape[-1])
    signs = None if signs is None else contiguous(signs.to(torch.float32))
    with checks.no_autocast(x.device.type):
        y = backends.of_device(x.device.type).hadamard(rows, signs, transposed)
    return shaped(y, *x.shape)


def _fake(x: Tensor, signs: Tensor | None, transposed: bool) -> Tensor:
    _check(x, signs)
    return x.new_empty(x.shape)


def _transformed(x: Tensor, signs: Tensor | None, transposed: bool) -> Tensor:
    """Inside a transform: plain torch, which has all derivatives."""
    _check(x, signs)
    with checks.no_autocast(x.device.type):
        return reference.hadamard_transform(x, signs, transposed).to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, signs, ctx.transposed = inputs
    ctx.save_for_backward(signs, x if signs is not None and ctx.needs_input_grad[1] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signs, x = ctx.saved_tensors
    grad_x = grad_signs = None
    if ctx.needs_input_grad[0]:
        grad_x = hadamard(grad, signs, transposed=not ctx.transposed)
    if x is not None:
        # Of H (s * x) the gradient for s is x * (H^T grad); of s * (H^T x) it is grad * (H^T x).
        at, other = (x, grad) if ctx.transposed else (grad, x)
        terms = hadamard(at.float(), transposed=True) * other.float()
        grad_signs = terms.reshape(-1, terms.shape[-1]).sum(0).to(signs.dtype)
    return grad_x, grad_signs, None


_hadamard = library.op(
    "hadamard",
    "(Tensor x, Tensor? signs, bool transposed) -> Tensor",
    _compute,
    _fake,
    transform=_transformed,
    derivatives=(_setup_context, _backward),
)
