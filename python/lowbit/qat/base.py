"""What weight quantizers share: W^ = quantize(W) in forward, the gradient of a surrogate in backward.

A quantizer states one value, the QuantTensor of `quant_tensor`, and its fake-quantized weight is that weight,
dequantized. The derivative of rounding is replaced by that of a smooth surrogate (the straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432), which each quantizer names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit import modes, reference
from lowbit.formats import Format, as_format
from lowbit.methods import grid, quantize
from lowbit.weights.quantized import QuantTensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _TransformedStraightThrough(torch.autograd.Function):
    """The same inside transforms of torch.func and for forward-mode AD; torch.compile would not take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(surrogate: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def straight_through(surrogate: Tensor, values: Tensor) -> Tensor:
    """`values`, with the gradients of `surrogate`; both have one shape and dtype."""
    if not torch.compiler.is_compiling() and modes.active():
        return _TransformedStraightThrough.apply(surrogate, values)
    return _StraightThrough.apply(surrogate, values)


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """x, with `factor` times its gradient."""
    return straight_through(x * factor, x.detach())


class WeightQuantizer(nn.Module):
    """Takes a weight (N, K) to its fake-quantized values (N, K), with gradients.

    Subclasses say what the quantized weight is (`encode`) and what the gradient is (`surrogate`).

    Attributes:
        format: of the weight that `quant_tensor` makes.
    """

    def __init__(self, format: Format | str) -> None:
        super().__init__()
        self.format = as_format(format)

    def encode(self, weight: Tensor) -> QuantTensor:
        """Quantizes a weight (N, K) fp32 that was checked; no gradients are recorded."""
        raise NotImplementedError

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """What is differentiated in place of the quantizer, (N, K): by default the weight itself.

        `qt` is the quantized weight and `codes` are its codes, (N, K) uint8.
        """
        return weight

    @torch.no_grad()
    def quant_tensor(self, weight: Tensor) -> QuantTensor:
        """The quantized weight.

        Raises:
            TypeError, ValueError: as `lowbit.quantize`.
        """
        grid.check_weight(weight, self.format)
        return self.encode(weight.detach().to(torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """What `quant_tensor(weight)` dequantizes to, in the dtype of `weight`."""
        qt = self.quant_tensor(weight)
        codes = torch.ops.lowbit.unpack(qt.codes, self.format.spec, weight.shape[1])
        values = reference.values_of(qt)
        values = reference.apply_scales(
            values, self.format, reference.effective_scales(qt), reference.effective_zeros(qt)
        )
        surrogate = self.surrogate(weight, qt, codes)
        return straight_through(surrogate.to(weight.dtype), values.to(weight.dtype))

    def extra_repr(self) -> str:
        """The format."""
        return f"format={self.format.name}"


class STE(WeightQuantizer):
    """`lowbit.quantize` at every step; surrogate: the weight.

    Args:
        weight: not looked at: scales and tables follow the weight.
        format, method, options: as in `lowbit.quantize`.
    """

    def __init__(
        self, weight: Tensor, format: Format | str, method: str | None = None, **options: Any
    ) -> None:
        super().__init__(format)
        self.method, self.options = method, options

    def encode(self, weight: Tensor) -> QuantTensor:
        """As `lowbit.quantize`."""
        return quantize(weight, self.format, self.method, **self.options)


def set_codes(qt: QuantTensor, codes: Tensor) -> QuantTensor:
    """Packs codes (N, K) uint8 into `qt` and returns it."""
    qt.tensors["codes"].copy_(torch.ops.lowbit.pack(codes, qt.format.spec))
    return qt
