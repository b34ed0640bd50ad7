"""Derivatives of x W^T + bias with a quantized weight: for lowbit::linear_trainable and linear_outliers_trainable,
which `ops.py` registers, and for what takes their place in transforms of torch.func and in forward-mode AD.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import checks, fused, gradients, modes, outliers, reference, transforms


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `backward` needs: x only for gradients of the weight."""
    x, codes, scales, zeros, table, bias, *rest = inputs
    ctx.meaning, sparse = rest[:4], rest[4:]
    wants_weight = any(ctx.needs_input_grad[2:5])
    ctx.save_for_backward(x if wants_weight else None, codes, scales, zeros, table, *sparse)
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As in a dense layer of the dtype of x: dx is computed with the weight rounded to it."""
    return _backward(ctx, grad, *ctx.saved_tensors)


def _backward(ctx: Any, grad: Tensor, x: Any, *saved: Any) -> tuple[Tensor | None, ...]:
    weight, sparse = saved[:4], saved[4:]
    needs = ctx.needs_input_grad
    n, k = ctx.meaning[2:]
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = grad @ _dense(weight, ctx.meaning, ctx.x_dtype, sparse)
    if needs[5]:
        grad_bias = grad.reshape(-1, n).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    terms: tuple[Tensor | None, ...] = (None, None, None)
    wanted = list(needs[2:5])
    if any(wanted):
        rows, x_rows = grad.reshape(-1, n).float(), x.reshape(-1, k).float()
        with _no_autocast(grad.device.type):
            grad_weight = rows.t() @ x_rows
        terms = _codebook_grad()(grad_weight, *weight, *ctx.meaning, wanted)
        terms = tuple(g if want else None for g, want in zip(terms, wanted, strict=True))
    return grad_x, None, *terms, grad_bias, *(None for _ in (*ctx.meaning, *sparse))


def _dense(weight: Any, meaning: Any, dtype: torch.dtype, sparse: Any) -> Tensor:
    """The weight; differentiable where derivatives of derivatives are wanted."""
    columns, values = sparse or (None, None)
    differentiable = torch.is_grad_enabled() and checks.requires_grad(*weight[1:])
    decode = gradients.dequantize if differentiable else None
    return outliers.dequantize(weight, meaning, dtype, columns, values, decode)


def _codebook_grad() -> Any:
    if torch.is_grad_enabled() or modes.in_dual_level():
        return gradients.codebook_grad
    return torch.ops.lowbit.codebook_grad


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


_LINEAR_ARGUMENTS = 10  # of lowbit::linear


class Linear(torch.autograd.Function):
    """The two ops with all derivatives, forward and of any order, and a rule for vmap; a call takes longer.

    Arguments are those of lowbit::linear, and the columns and values of outliers if there are any.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """The product of the inference ops."""
        if len(args) == _LINEAR_ARGUMENTS:
            return torch.ops.lowbit.linear.default(*args)
        return torch.ops.lowbit.linear_outliers.default(*args, None, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """As of the op; forward-mode AD needs x always."""
        setup_context(ctx, inputs, output)
        x, *weight = inputs[:5]
        ctx.save_for_forward(x, *weight, *inputs[_LINEAR_ARGUMENTS:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """As of the op."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return _backward(ctx, grad, *map(modes.bare, ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The map is linear in x, in the bias and in each operand of the codebook."""
        x, *weight = map(modes.bare, ctx.saved_tensors)
        weight, sparse = weight[:4], weight[4:]
        of_x, _, *of_weight, of_bias = tangents[:6]
        n = ctx.meaning[2]
        y = x.new_zeros((*x.shape[:-1], n))
        if of_x is not None:
            y = y + F.linear(of_x, _dense(weight, ctx.meaning, x.dtype, sparse))
        if any(t is not None for t in of_weight):
            moved = gradients.weight_tangent(*weight, *ctx.meaning, *of_weight)
            y = y + F.linear(x.float(), moved).to(y.dtype)
        return y if of_bias is None else y + of_bias.to(y.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """A batch of x is more rows; a batch of weights is one product after another."""
        if in_dims[0] is not None and all(d is None for d in in_dims[1:]):
            return Linear.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return transforms.repeat(Linear.apply, info, in_dims, args)


def transformed_epilogue(x: Tensor, *args: Any) -> Tensor:
    """lowbit::linear_epilogue inside a transform: step by step, each rounded."""
    *product, gate, residual = args[:7]
    *meaning, activation = args[7:]
    y = Linear.apply(x, *product, *meaning)
    return reference.apply_epilogue(y, activation, gate, residual)


def transformed_outliers(x: Tensor, *args: Any) -> Tensor:
    """lowbit::linear_outliers inside a transform."""
    *product, gate, residual, activation = args
    return reference.apply_epilogue(Linear.apply(x, *product), activation, gate, residual)


def transformed_many(x: Tensor, *args: Any) -> list[Tensor]:
    """lowbit::linear_many inside a transform."""
    *each, layout, n, k = args
    return [Linear.apply(x, *one, layout, rows, k) for *one, rows in zip(*each, n, strict=True)]


def transformed_siblings(x: Tensor, group: int) -> list[Tensor]:
    """lowbit::linear_siblings inside a transform."""
    return transformed_many(x, *fused.arguments(group))


def transformed_dequantize(codes: Tensor, *args: Any) -> Tensor:
    """lowbit::dequantize inside a transform: in plain torch if that may want derivatives of the weight."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(t is not None and wrapped(t) for t in args[:3]):
        return gradients.dequantize(codes, *args)
    return transforms.opaque(torch.ops.lowbit.dequantize.default, False, codes, *args)
