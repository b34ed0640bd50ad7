"""FP8Linear: y = x W^T + bias with all three products of training in FP8; takes the place of nn.Linear.

x (..., K) in fp32, bf16 or fp16 gives (..., N) in the same dtype. Weight and bias stay as nn.Linear has them, and
are what an optimizer and a state dict see. (COAT, Xi et al., arXiv 2410.19313; blocks as in DeepSeek-V3, 2412.19437.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit import fp8, modes
from lowbit.nn.leaf import Proxy, node_of
from lowbit.ops import checks
from lowbit.ops.linear import autocast
from lowbit.strides import shaped

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# Granularities of activations and gradients, and of weights.
_GRANULARITIES = {
    "tensor": ("tensor", "tensor"),
    "row": ("row", "row"),
    "128x128": ("1x128", "128x128"),
}


class _Quantized(NamedTuple):
    q: Tensor
    scale: Tensor


def _quantize(x: Tensor, dtype: torch.dtype, granularity: str) -> _Quantized:
    return _Quantized(*fp8.quantize(x, dtype, granularity))


def _quantize_both(
    x: Tensor, dtype: torch.dtype, granularity: str
) -> tuple[_Quantized, _Quantized]:
    """x and x^T, whose scales are those of x, transposed."""
    q, scale, q_t = fp8.quantize(x, dtype, granularity, transposed=True)
    return _Quantized(q, scale), _Quantized(q_t, scale.t() if scale.dim() else scale)


def _multiply(
    a: _Quantized, b: _Quantized, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # (M, K) x (N, K) to (M, N)
    return fp8.scaled_mm(a.q, b.q, a.scale, b.scale, bias, out_dtype=dtype)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (R, K)
        weight: Tensor,  # (N, K)
        bias: Tensor | None,
        granularity: str,
        quantized: _Quantized,  # the weight
    ) -> Tensor:
        values, _ = _GRANULARITIES[granularity]
        ctx.granularity, ctx.x_dtype = granularity, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # x^T as the product for the gradient of the weight reads it: scaled along the rows of x.
        saved: tuple[Tensor | None, Tensor | None] = (None, None)
        if not ctx.needs_input_grad[1]:
            a = _quantize(x, _FORWARD, values)
        elif granularity == "tensor":
            a, saved = _quantize_both(x, _FORWARD, values)
        else:
            a, saved = _quantize(x, _FORWARD, values), _quantize(x.t(), _FORWARD, values)
        ctx.save_for_backward(*saved, weight)
        return _multiply(a, quantized, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_q, x_scale, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        values, of_weight = _GRANULARITIES[ctx.granularity]
        grad_x = grad_weight = grad_bias = by_column = None
        if needs_x:
            if ctx.granularity == "row":
                columns = _quantize(weight.t(), _FORWARD, of_weight)
            else:
                columns = _quantize_both(weight, _FORWARD, of_weight)[1]
            if ctx.granularity == "tensor" and needs_weight:
                by_row, by_column = _quantize_both(grad, _BACKWARD, values)
            else:
                by_row = _quantize(grad, _BACKWARD, values)
            grad_x = _multiply(by_row, columns, None, ctx.x_dtype)
        if needs_weight:
            by_column = by_column or _quantize(grad.t(), _BACKWARD, values)
            grad_weight = _multiply(by_column, _Quantized(x_q, x_scale), None, weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class FP8Linear(nn.Linear):
    """A linear layer that multiplies FP8 numbers, in training and in inference.

    The forward product takes x and W in E4M3; the backward products take the gradient of y in E5M2 with W and x in
    E4M3 (OCP OFP8's use of the two types). Sums are fp32. Scales are made from the values at hand ("just in time"):
    nothing is carried from step to step. Saved for backward is x in FP8, a byte for each number and its scales.

    Granularity of the scales: "tensor", one for each operand; "row", one for each row of both operands of every
    product; "128x128", blocks of the weight with 1 x 128 groups of activations and gradients. The last two keep x by
    columns for the gradient of the weight, quantized apart.

    In eval mode, where no gradient is needed, the FP8 weight is kept between calls until the weight changes; after a
    write behind autograd's back (`weight.data.copy_`) call `train` or `eval` again.

    Attributes:
        in_features, out_features, weight, bias: as in nn.Linear; the weight is fp32, bf16 or fp16.
        granularity: "tensor", "row" or "128x128".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        granularity: str = "tensor",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes and initializes a layer as nn.Linear does.

        Raises:
            ValueError: the granularity is unknown.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_granularity(granularity)

    def _set_granularity(self, granularity: str) -> None:
        if granularity not in _GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {list(_GRANULARITIES)}, got {granularity!r}"
            )
        self.granularity = granularity
        self._kept: tuple[weakref.ref[Tensor], tuple[object, ...], _Quantized] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, granularity: str = "tensor") -> FP8Linear:
        """Takes over a dense layer; its weight and bias are shared.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            NotImplementedError: it is a subclass that computes something else.
            ValueError: the granularity is unknown.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if type(linear).forward not in (nn.Linear.forward, cls.forward):
            raise NotImplementedError(
                f"linear is a {type(linear).__name__}, whose forward is not that of nn.Linear"
            )
        dtype = linear.weight.dtype
        layer = cls(linear.in_features, linear.out_features, False, granularity, "meta", dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias: x (..., K) gives (..., N) in its dtype, or in that of autocast.

        Raises:
            TypeError: x is not fp32, bf16 or fp16.
            ValueError: the last dimension of x is not K, or x is on another device.
        """
        if isinstance(x, Proxy):
            return node_of(self, x)
        x = autocast(x)
        checks.check_float("x", x.dtype)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"x must be on {self.weight.device}, got {x.device}")
        if not x.numel() or not self.out_features:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and checks.requires_grad(rows, self.weight, self.bias):
            if not torch.compiler.is_compiling() and modes.active():
                raise NotImplementedError(
                    "FP8Linear has gradients in plain autograd alone, not inside transforms of "
                    "torch.func or forward-mode AD: use an nn.Linear of its weight there"
                )
            quantized = self._quantize_weight()
            y = _Product.apply(rows, self.weight, self.bias, self.granularity, quantized)
        else:
            a = _quantize(rows, _FORWARD, _GRANULARITIES[self.granularity][0])
            y = _multiply(a, self._inference_weight(), self.bias, x.dtype)
        return shaped(y, *x.shape[:-1], self.out_features)

    def _quantize_weight(self) -> _Quantized:
        weight = self.weight.detach()
        return _quantize(weight, _FORWARD, _GRANULARITIES[self.granularity][1])

    def _inference_weight(self) -> _Quantized:
        w = self.weight
        if (
            self.training
            or torch.compiler.is_compiling()  # which traces nothing of what follows
            or w.is_inference()
            or modes.active()
        ):
            return self._quantize_weight()
        # Not by its address alone: another weight may lie where the last one did.
        key = (w.data_ptr(), w._version, w.dtype, w.device, self.granularity)
        if self._kept is None or self._kept[0]() is not w or self._kept[1] != key:
            with modes.outside():
                self._kept = weakref.ref(w), key, self._quantize_weight()
        return self._kept[2]

    def train(self, mode: bool = True) -> FP8Linear:
        """As in nn.Module; forgets the FP8 weight that inference has kept."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FP8Linear:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Shape, bias and granularity."""
        return f"{super().extra_repr()}, granularity={self.granularity!r}"
