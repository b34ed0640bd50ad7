"""Activation quantizers: x to its fake-quantized values, with gradients; and what computes them after `convert`.

PACT and DoReFa clip to a range and round; the int8 rows of BitNet and the binary rows of XNOR-Net have a scale for
each row, and kernels of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit import int8, reference
from lowbit.nn import BinaryLinear, QuantLinear
from lowbit.nn.leaf import Proxy, node_of
from lowbit.qat.base import straight_through
from lowbit.weights.quantized import QuantTensor


class ActivationQuantizer(nn.Module):
    """Takes x to fake-quantized values of the same shape and dtype.

    Attributes:
        per_row: whether a value depends on the rest of its row (..., K), so that a convolution
            quantizes patches, not pixels.
    """

    per_row = False

    def convert(self, weight: QuantTensor, bias: Tensor | None) -> nn.Module:
        """A module that multiplies the quantized x by the packed weight: here this quantizer, then a QuantLinear."""
        return nn.Sequential(self, QuantLinear.from_quant_tensor(weight, bias))


class PACT(ActivationQuantizer):
    """Parameterized clipping (Choi et al. 2018, arXiv 1805.06085).

    y = clamp(x, 0, a) is rounded to a / (2^bits - 1) * integer. dy/dx = 1 for 0 <= x < a, else 0; dy/da = 1 for
    x >= a, else 0. The paper adds an L2 penalty on a: give `clip` weight decay.

    Args:
        bits: 1 to 8.
        clip: what a starts at, positive; the default is our choice.

    Attributes:
        clip: Parameter () fp32.
    """

    def __init__(self, bits: int, clip: float = 6.0) -> None:
        super().__init__()
        _check_bits(bits)
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip!r}")
        self.bits = bits
        self.clip = nn.Parameter(
            torch.tensor(float(clip), dtype=torch.float32, device=torch.get_default_device())
        )

    def forward(self, x: Tensor) -> Tensor:
        """The clipped and rounded x.

        Raises:
            ValueError: the clip is no longer positive.
        """
        if isinstance(x, Proxy):
            return node_of(self, x)
        if not self.clip.item() > 0:
            raise ValueError(
                f"clip must be positive, got {self.clip.item():g}: lower its learning rate"
            )
        levels = 2**self.bits - 1
        with torch.no_grad():
            clipped = torch.minimum(x.float().relu(), self.clip)
            values = (clipped * (levels / self.clip)).round() * (self.clip / levels)
        inside = x * (x.detach() >= 0)
        surrogate = torch.where(x < self.clip, inside, self.clip.to(x.dtype))
        return straight_through(surrogate, values.to(x.dtype))

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


class DoReFaActivation(ActivationQuantizer):
    """round((2^k - 1) x) / (2^k - 1) for x clipped to [0, 1] (Zhou et al. 2016, arXiv 1606.06160).

    The gradient is that of the clipping: 1 inside [0, 1], else 0.

    Args:
        bits: k, 1 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        _check_bits(bits)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """The clipped and rounded x."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        levels = 2**self.bits - 1
        clipped = x.clamp(0, 1)
        values = (clipped.detach().float() * levels).round() / levels
        return straight_through(clipped, values.to(x.dtype))

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


class Int8Activation(ActivationQuantizer):
    """Symmetric int8 with a scale for each row: q = round(127 x / absmax) (BitNet b1.58, arXiv 2402.17764).

    The gradient is passed straight through. `convert` gives a QuantLinear whose format has activation "int8": its
    kernels quantize the rows alike and sum the products in int32.
    """

    per_row = True

    def forward(self, x: Tensor) -> Tensor:
        """q * absmax / 127, as `lowbit.int8.quantize` states them."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        with torch.no_grad():
            q, scales = int8.quantize(x.detach().reshape(-1, x.shape[-1]))
            values = (q * scales[:, None]).to(x.dtype).view_as(x)
        return straight_through(x, values)

    def convert(self, weight: QuantTensor, bias: Tensor | None) -> nn.Module:
        """A QuantLinear with int8 activations.

        Raises:
            ValueError: the weight's table is not exact in int8.
        """
        format = weight.format.with_activation("int8")
        return QuantLinear.from_quant_tensor(
            QuantTensor(format, weight.shape, weight.tensors), bias
        )


class XNORActivation(ActivationQuantizer):
    """mean |x| * sign(x) for each row, sign(0) = 1 (XNOR-Net, arXiv 1603.05279).

    Of a patch, mean |x| is the paper's K at that place. Surrogate, with mean |x| as a constant: mean |x| * x for
    |x| <= 1. That the mean is a constant is our reading. `convert` gives a BinaryLinear.
    """

    per_row = True

    def forward(self, x: Tensor) -> Tensor:
        """The scaled signs."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        with torch.no_grad():
            codes, scales = reference.quantize_binary(x.detach().reshape(-1, x.shape[-1]))
            scale = scales.view(*x.shape[:-1], 1)
            values = scale * (2 * codes.view(x.shape).to(torch.float32) - 1)
            slope = scale * (x.abs() <= 1)
        return straight_through(x * slope.to(x.dtype), values.to(x.dtype))

    def convert(self, weight: QuantTensor, bias: Tensor | None) -> nn.Module:
        """A BinaryLinear."""
        return BinaryLinear.from_quant_tensor(weight, bias)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits!r}")
