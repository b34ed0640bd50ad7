"""Normalizations and elementwise ops that save their inputs in FP8 for backward (COAT, arXiv 2410.19313, section 5).

Forward computes with x as it is, in the plain op. Saved is x in E4M3 with a bf16 scale for every 16 numbers of its
last dimension, 1.125 bytes each. Gradients are those of the plain op at the saved x, dequantized to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit import fp8, modes
from lowbit.nn.leaf import Proxy, node_of
from lowbit.ops import checks


class Saved(NamedTuple):
    """q (..., K) in E4M3 and scales (R, ceil(K / 16)) in bf16; R is the product of the other dimensions."""

    q: Tensor
    scale: Tensor


def _save(x: Tensor) -> Saved:
    rows = torch.atleast_1d(x.detach())
    q, scale = fp8.quantize(rows, torch.float8_e4m3fn, "1x16", scale_dtype=torch.bfloat16)
    return Saved(q.view(x.shape), scale)


def _load(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize(torch.atleast_1d(q), scale, dtype).view(q.shape)


def _plain(x: Tensor, y: Tensor | None = None, *parameters: Tensor | None) -> bool:
    """Whether the plain op does: no gradient is needed, there is nothing to save, or what is saved is not autograd's:
    inside a transform of torch.func or for forward-mode AD.
    """
    checks.check_tensors(x=x)
    if not torch.compiler.is_compiling() and modes.active():
        return True
    tensors = (x, y, *parameters)
    empty = any(t is not None and not t.numel() for t in tensors)
    return empty or not (torch.is_grad_enabled() and checks.requires_grad(*tensors))


class _Elementwise(torch.autograd.Function):
    """f(x), with the gradient of `backward(grad, x)`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.backward_of, ctx.dtype = backward, x.dtype
        ctx.save_for_backward(*_save(x))
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        x = _load(q, scale, ctx.dtype)
        return ctx.backward_of(grad, x), None, None


def _square(x: Tensor) -> Tensor:
    return x * x


def _square_backward(grad: Tensor, x: Tensor) -> Tensor:
    g = grad * x
    return g + g


class _Mul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        needs = ctx.needs_input_grad
        nothing = (None, None)
        ctx.save_for_backward(
            *(_save(y) if needs[0] else nothing), *(_save(x) if needs[1] else nothing)
        )
        ctx.like = (x.shape, x.dtype), (y.shape, y.dtype)
        return x * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        grads: list[Tensor | None] = []
        for (q, scale), (shape, dtype), (_, other) in zip(
            others, ctx.like, reversed(ctx.like), strict=True
        ):
            g = None if q is None else (grad * _load(q, scale, other)).sum_to_size(shape).to(dtype)
            grads.append(g)
        return tuple(grads)


class _Norm(torch.autograd.Function):
    """norm(x, *parameters); backward computes the norm again at the saved x."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: Callable[..., Tensor],
        saved: Saved | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.norm, ctx.dtype = norm, x.dtype
        ctx.save_for_backward(*(saved or _save(x)), *parameters)
        return norm(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, scale, *parameters = ctx.saved_tensors
        inputs = [_load(q, scale, ctx.dtype), *parameters]
        needs = ctx.needs_input_grad[2:]

        def norm(*wanted: Tensor) -> Tensor:
            given = iter(wanted)
            y: Tensor = ctx.norm(
                *(next(given) if need else t for t, need in zip(inputs, needs, strict=True))
            )
            return y

        vjp: Any = torch.func.vjp  # which torch.compile traces, and not torch.autograd.grad
        y, pullback = vjp(norm, *(t for t, need in zip(inputs, needs, strict=True) if need))
        grads = iter(pullback(grad.to(y.dtype)))
        return None, None, *(next(grads) if need else None for need in needs)


def fp8_silu(x: Tensor) -> Tensor:
    """F.silu(x) that saves x (...) in FP8."""
    if _plain(x):
        return F.silu(x)
    return _Elementwise.apply(x, F.silu, torch.ops.aten.silu_backward)


def fp8_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu(x) that saves x (...) in FP8; `approximate` is "none" or "tanh"."""
    if _plain(x):
        return F.gelu(x, approximate=approximate)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)

    return _Elementwise.apply(x, lambda x: F.gelu(x, approximate=approximate), backward)


def fp8_mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y, which broadcast, that saves in FP8 those that the gradients need."""
    checks.check_tensors(y=y)
    if _plain(x, y):
        return x * y
    if x is y:
        return _Elementwise.apply(x, _square, _square_backward)
    return _Mul.apply(x, y)


def fp8_add(x: Tensor, y: Tensor) -> tuple[Tensor, Saved | None]:
    """x + y, and the sum in FP8 for a normalization that follows, to be passed to it as `saved`.

    The gradient needs neither; the FP8 copy, None without gradients, is what the normalization would make and save.
    """
    checks.check_tensors(x=x, y=y)
    total = x + y
    return total, None if _plain(total) else _save(total)


def fp8_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    saved: Saved | None = None,
) -> Tensor:
    """F.rms_norm that saves x (..., *normalized_shape) in FP8, or `saved` from `fp8_add` in its place."""

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, normalized_shape, weight, eps)  # type: ignore[arg-type]

    return norm(x, weight) if _plain(x, weight) else _Norm.apply(norm, saved, x, weight)


def fp8_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    saved: Saved | None = None,
) -> Tensor:
    """F.layer_norm that saves x (..., *normalized_shape) in FP8, or `saved` from `fp8_add` in its place."""

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]

    if _plain(x, weight, bias):
        return norm(x, weight, bias)
    return _Norm.apply(norm, saved, x, weight, bias)


class FP8RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that saves its input in FP8: `fp8_rms_norm`."""

    def forward(self, x: Tensor, saved: Saved | None = None) -> Tensor:
        """The norm of x (..., *normalized_shape); `saved` is the second result of `fp8_add`."""
        if isinstance(x, Proxy):
            return node_of(self, x, saved)
        return fp8_rms_norm(x, self.normalized_shape, self.weight, self.eps, saved)


class FP8LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that saves its input in FP8: `fp8_layer_norm`."""

    def forward(self, x: Tensor, saved: Saved | None = None) -> Tensor:
        """The norm of x (..., *normalized_shape); `saved` is the second result of `fp8_add`."""
        if isinstance(x, Proxy):
            return node_of(self, x, saved)
        return fp8_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, saved)
