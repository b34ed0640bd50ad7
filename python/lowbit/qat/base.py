"""What weight quantizers share: W^ = quantize(W) in forward, the gradient of a surrogate in backward.

A quantizer states one value, the QuantTensor of `quant_tensor`, and its fake-quantized weight is that weight,
dequantized. The derivative of rounding is replaced by that of a smooth surrogate (the straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432), which each quantizer names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit import reference
from lowbit.formats import Format, as_format
from lowbit.nn.packed import zero_weight
from lowbit.quantize import rtn
from lowbit.tensor import QuantTensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(surrogate: Tensor, values: Tensor) -> Tensor:
    """`values`, with the gradients of `surrogate`; both have one shape and dtype."""
    return _StraightThrough.apply(surrogate, values)


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """x, with `factor` times its gradient."""
    return straight_through(x * factor, x.detach())


class WeightQuantizer(nn.Module):
    """Takes a weight (N, K) to its fake-quantized values (N, K), with gradients.

    Subclasses say what the codes are (`encode`) and what the gradient is (`surrogate`).

    Attributes:
        format: of the weight that `quant_tensor` makes.
    """

    def __init__(self, format: Format | str) -> None:
        super().__init__()
        self.format = as_format(format)

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Scales, zeros and tables for a weight (N, K) fp32, in a QuantTensor whose codes are 0, and the codes,
        (N, K) uint8.
        """
        raise NotImplementedError

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """What is differentiated in place of the quantizer, (N, K): by default the weight itself."""
        return weight

    @torch.no_grad()
    def quant_tensor(self, weight: Tensor) -> QuantTensor:
        """The quantized weight, packed.

        Raises:
            TypeError, ValueError: as `lowbit.quantize`.
        """
        qt, codes = self._encode(weight)
        qt.tensors["codes"].copy_(torch.ops.lowbit.pack(codes, self.format.spec))
        return qt

    def forward(self, weight: Tensor) -> Tensor:
        """What `quant_tensor(weight)` dequantizes to, in the dtype of `weight`."""
        with torch.no_grad():
            qt, codes = self._encode(weight)
            values = reference.code_values(codes, self.format, qt.table)
            scales = reference.effective_scales(qt)
            values = reference.apply_scales(values, self.format, scales, qt.zeros)
        surrogate = self.surrogate(weight, qt, codes)
        return straight_through(surrogate.to(weight.dtype), values.to(weight.dtype))

    def _encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        rtn.check_weight(weight, self.format)
        return self.encode(weight.detach().to(torch.float32))

    def blank(self, weight: Tensor) -> QuantTensor:
        """A QuantTensor for a weight, all of it 0."""
        n, k = weight.shape
        return zero_weight(self.format, n, k, weight.device)

    def extra_repr(self) -> str:
        """The format."""
        return f"format={self.format.name}"


class RTN(WeightQuantizer):
    """Round to nearest in any format that is not fitted; surrogate: the weight.

    Args:
        weight: not looked at: scales follow the weight at every step, as `lowbit.quantize` fits them.
        format: a Format or its name.
    """

    def __init__(self, weight: Tensor, format: Format | str) -> None:
        super().__init__(format)
        if self.format.fitted:
            raise ValueError(
                f"format {self.format.name!r} is fitted: use ClusterMeans, SoftKMeans or TTQ"
            )

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """As `lowbit.quantize(weight, format)`."""
        qt = rtn.start(weight, self.format)
        return qt, nearest(weight, qt)


def nearest(weight: Tensor, qt: QuantTensor) -> Tensor:  # (N, K) uint8
    """The nearest code of every weight for the scales, zeros and table of `qt`."""
    return torch.cat([codes for _, codes in rtn.choose_codes(qt, weight)])


def per_weight(terms: Tensor, format: Format, k: int) -> Tensor:  # (N, groups) -> (N, K)
    """The term of its group for every weight."""
    return terms[:, reference.group_index(format, k, terms.device)]


def group_sizes(format: Format, k: int, device: torch.device) -> Tensor:  # (groups,) fp32
    """How many weights of a row each group has."""
    index = reference.group_index(format, k, device)
    return torch.bincount(index, minlength=format.num_groups(k)).float()


def mean_magnitude(weight: Tensor, format: Format, scope: str) -> Tensor:  # (N, groups) fp32
    """mean |w| of the whole weight (`scope` "tensor") or of each group ("group"), summed in fp64."""
    n, k = weight.shape
    magnitude = weight.detach().double().abs()
    if scope == "tensor":
        return magnitude.mean().float().expand(n, format.num_groups(k))
    sums = magnitude.new_zeros(n, format.num_groups(k))
    sums.index_add_(1, reference.group_index(format, k, weight.device), magnitude)
    return (sums / group_sizes(format, k, weight.device)).float()


def check_scope(scope: str) -> None:
    """Raises ValueError unless `scope` is "tensor" or "group"."""
    if scope not in ("tensor", "group"):
        raise ValueError(f"scope must be 'tensor' or 'group', got {scope!r}")
