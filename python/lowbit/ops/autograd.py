"""Derivatives of x W^T + bias + added with a quantized weight: for lowbit::linear_trainable, and for what takes the
place of the products in transforms of torch.func and in forward-mode AD. All take the flat arguments of
lowbit::linear_trainable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import modes, reference
from lowbit.layouts import Operands
from lowbit.ops import checks, gradients, transforms

_W = slice(1, 1 + len(Operands._fields))
_CODEBOOK = slice(2, 5)  # scales, zeros and table


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `backward` needs: x only for gradients of the weight."""
    x, w, bias = inputs[0], Operands(*inputs[_W]), inputs[_W.stop]
    ctx.meaning = w[len(w.tensors) :]
    ctx.save_for_backward(x if any(ctx.needs_input_grad[_CODEBOOK]) else None, *w.tensors)
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As in a dense layer of the dtype of x: dx is computed with the weight rounded to it."""
    return _backward(ctx, grad, *ctx.saved_tensors)


def _backward(ctx: Any, grad: Tensor, x: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
    needs, w = ctx.needs_input_grad, Operands(*tensors, *ctx.meaning)
    grad_x = grad_bias = grad_added = None
    if needs[0]:
        grad_x = grad @ _dense(w, ctx.x_dtype)
    if needs[_W.stop]:
        grad_bias = grad.reshape(-1, w.n).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if needs[_W.stop + 1]:
        grad_added = grad.float()
    codebook: tuple[Tensor | None, ...] = (None, None, None)
    wanted = list(needs[_CODEBOOK])
    if any(wanted):
        rows, x_rows = grad.reshape(-1, w.n).float(), x.reshape(-1, w.k).float()
        with checks.no_autocast(grad.device.type):
            grad_weight = rows.t() @ x_rows
        found = _codebook_grad(grad_weight, w, wanted)
        codebook = tuple(g if want else None for g, want in zip(found, wanted, strict=True))
    rest = (None,) * (len(w) - 1 - len(codebook))
    return grad_x, None, *codebook, *rest, grad_bias, grad_added


def _dense(w: Operands, dtype: torch.dtype) -> Tensor:
    """The weight; differentiable where derivatives of derivatives are wanted."""
    if torch.is_grad_enabled() and checks.requires_grad(*w.tensors[1:]):
        return gradients.dequantize(w, dtype)
    made: Tensor = torch.ops.lowbit.dequantize(*w, dtype)
    return made


def _codebook_grad(grad_weight: Tensor, w: Operands, wanted: list[bool]) -> Any:
    if torch.is_grad_enabled() or modes.in_dual_level():
        return gradients.codebook_grad(grad_weight, w, wanted)
    return torch.ops.lowbit.codebook_grad(grad_weight, *w, wanted)


class Linear(torch.autograd.Function):
    """lowbit::linear_trainable with all derivatives, forward and of any order, and a rule for vmap; a call takes
    longer.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """The product of the inference ops."""
        *product, added = args
        if added is None:
            return torch.ops.lowbit.linear.default(*product)
        return torch.ops.lowbit.linear_epilogue.default(*product, None, None, added, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """As of the op; forward-mode AD needs x always."""
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *Operands(*inputs[_W]).tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """As of the op."""
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return _backward(ctx, grad, *map(modes.bare, ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The map is linear in x, in the bias, in what is added and in each operand of the codebook."""
        x, *tensors = map(modes.bare, ctx.saved_tensors)
        w = Operands(*tensors, *ctx.meaning)
        of_x, of_codebook = tangents[0], tangents[_CODEBOOK]
        y = x.new_zeros((*x.shape[:-1], w.n))
        if of_x is not None:
            y = y + F.linear(of_x, _dense(w, x.dtype))
        if any(t is not None for t in of_codebook):
            moved = gradients.weight_tangent(w, *of_codebook)
            y = y + F.linear(x.float(), moved).to(y.dtype)
        for tangent in tangents[_W.stop :]:
            if tangent is not None:
                y = y + tangent.to(y.dtype)
        return y

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """A batch of x is more rows; a batch of weights is one product after another."""
        of_x, *of_weight, of_added = in_dims
        together = (of_added is None) == (args[-1] is None)
        if of_x is not None and together and all(d is None for d in of_weight):
            added = None if args[-1] is None else args[-1].movedim(of_added, 0)
            return Linear.apply(args[0].movedim(of_x, 0), *args[1:-1], added), 0
        return transforms.repeat(Linear.apply, info, in_dims, args)


def transformed_linear(*args: Any) -> Tensor:
    """lowbit::linear inside a transform."""
    return Linear.apply(*args, None)


def transformed_epilogue(x: Tensor, *args: Any) -> Tensor:
    """lowbit::linear_epilogue inside a transform: step by step, each rounded."""
    *product, gate, residual, added, activation = args
    y = Linear.apply(x, *product, added)
    return reference.apply_epilogue(y, activation, gate, residual)


def transformed_dequantize(*args: Any) -> Tensor:
    """lowbit::dequantize inside a transform: in plain torch if that may want derivatives of the weight."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    w = Operands(*args[:-1])
    if any(t is not None and wrapped(t) for t in w.tensors):
        return gradients.dequantize(w, args[-1])
    return transforms.opaque(torch.ops.lowbit.dequantize.default, False, *args)


def transformed_codebook_grad(grad_weight: Tensor, *args: Any) -> Any:
    """lowbit::codebook_grad inside a transform."""
    return gradients.codebook_grad(grad_weight, Operands(*args[:-1]), args[-1])
