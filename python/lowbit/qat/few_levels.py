"""Binary, ternary and DoReFa weights.

For each: which code a weight gets, the scale or table, and the surrogate whose gradient the weight receives.
Means are summed in fp64 and rounded to fp32, and are constants for the gradient unless a Parameter holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit import reference
from lowbit.formats import Format
from lowbit.qat.base import WeightQuantizer, check_scope, group_sizes, mean_magnitude, per_weight
from lowbit.quantize import rtn
from lowbit.tensor import QuantTensor

_TERNARY = (-1.0, 0.0, 1.0)


class BWN(WeightQuantizer):
    """alpha * sign(w), alpha = mean |w| of a filter: Binary-Weight-Networks (Rastegari et al. 2016, arXiv 1603.05279).

    sign(0) = 1. The gradient is the paper's, dL/dw = dL/dw^ * (1 / n + alpha * [|w| <= 1]), n the weights that share
    alpha. With `XNORActivation` it is XNOR-Net.

    Args:
        weight: not looked at: alpha follows the weight.
        format: with the table (-1, 1); a group other than the row is our reading.
    """

    def __init__(self, weight: Tensor, format: Format | str = "binary_row_fp32") -> None:
        super().__init__(format)
        _check_table(self.format, (-1.0, 1.0))

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Signs and means of magnitudes."""
        qt = self.blank(weight)
        qt.tensors["scales"].copy_(mean_magnitude(weight, self.format, "group"))
        return qt, (weight >= 0).to(torch.uint8)

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """The weight times the paper's factor."""
        k = weight.shape[1]
        alpha = per_weight(_scales(qt), self.format, k)
        sizes = per_weight(group_sizes(self.format, k, weight.device)[None], self.format, k)
        slope = 1 / sizes + alpha * (weight.detach().abs() <= 1)
        return weight * slope.to(weight.dtype)


class TWN(WeightQuantizer):
    """Ternary weights of least error (Li et al. 2016, arXiv 1605.04711): -alpha, 0, alpha.

    delta = 0.7 mean |w|; alpha = the mean of |w| over |w| > delta; surrogate: the weight. With no weight above delta
    (all are 0) alpha is 0.

    Args:
        weight: not looked at.
        format: with the table (-1, 0, 1) and a scale for each row.
        scope: the means are of the whole "tensor", as in the paper, or of each row ("group").
    """

    def __init__(
        self, weight: Tensor, format: Format | str = "ternary_row_fp32", scope: str = "tensor"
    ) -> None:
        super().__init__(format)
        check_scope(scope)
        _check_table(self.format, _TERNARY)
        if self.format.group is not None:
            raise ValueError(f"format must have a scale for each row, got {self.format.name!r}")
        self.scope = scope

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Codes by the threshold."""
        qt = self.blank(weight)
        delta = 0.7 * mean_magnitude(weight, self.format, self.scope)
        above = weight.abs() > delta
        total = torch.where(above, weight.double().abs(), 0.0).sum(1, keepdim=True)
        count = above.sum(1, keepdim=True)
        if self.scope == "tensor":
            total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        alpha = total / count.clamp(min=1)
        qt.tensors["scales"].copy_(alpha.expand_as(qt.tensors["scales"]))
        return qt, _ternary_codes(weight, above)


class AbsMeanTernary(WeightQuantizer):
    """Weights of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764): gamma * RoundClip(w / (gamma + eps), -1, 1).

    gamma = mean |w| of the whole weight; surrogate: the weight. eps = 1e-5 is our reading.

    Args:
        weight: not looked at.
        format: with the table (-1, 0, 1).
    """

    EPS = 1e-5

    def __init__(self, weight: Tensor, format: Format | str = "ternary_row_fp32") -> None:
        super().__init__(format)
        _check_table(self.format, _TERNARY)

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Rounded weights, ties to even."""
        qt = self.blank(weight)
        gamma = mean_magnitude(weight, self.format, "tensor")
        qt.tensors["scales"].copy_(gamma)
        ratio = weight / (gamma[:1, :1] + self.EPS)
        return qt, (ratio.round().clamp(-1, 1) + 1).to(torch.uint8)


class TTQ(WeightQuantizer):
    """Trained ternary quantization (Zhu et al. 2017, arXiv 1612.01064): -wn, 0, wp with learned wn and wp.

    delta = threshold * max |w|. Gradients: dL/dwp = sum of dL/dw^ over w > delta; dL/dwn = -sum over w < -delta (the
    paper prints no sign; this is the derivative of -wn); dL/dw = dL/dw^ times wp, 1 and wn above, between and below.

    Args:
        weight: (N, K). wp and wn start at the mean magnitude of their weights (our reading), 0 if there are none.
        threshold: the paper's 0.05.

    Attributes:
        wp, wn: Parameters () fp32.
    """

    def __init__(self, weight: Tensor, threshold: float = 0.05) -> None:
        # A fitted table has 2^bits entries: no code is 3.
        super().__init__(Format.lut(bits=2, group=None, scale=None))
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold!r}")
        rtn.check_weight(weight, self.format)
        self.threshold = threshold
        w = weight.detach().double()
        codes = self._codes(w)
        wn, wp = (
            torch.where(codes == code, w.abs(), 0.0).sum() / (codes == code).sum().clamp(min=1)
            for code in (0, 2)
        )
        self.wp, self.wn = nn.Parameter(wp.float()), nn.Parameter(wn.float())

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Codes by the threshold, the table (-wn, 0, wp, 0)."""
        qt = self.blank(weight)
        zero = torch.zeros_like(self.wp)
        rtn.set_table(qt, torch.stack([-self.wn, zero, self.wp, zero]).detach())
        return qt, self._codes(weight)

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """Linear in weight, wp and wn, with the gradients above."""
        above, below = codes == 2, codes == 0
        slope = torch.where(above, self.wp.detach(), torch.where(below, self.wn.detach(), 1.0))
        learned = torch.where(above, self.wp, torch.where(below, -self.wn, 0.0))
        return weight * slope.to(weight.dtype) + learned.to(weight.dtype)

    def _codes(self, weight: Tensor) -> Tensor:
        magnitude = weight.abs()
        return _ternary_codes(weight, magnitude > self.threshold * magnitude.max())


class DoReFa(WeightQuantizer):
    """2 q_k(tanh(w) / (2 max |tanh w|) + 1/2) - 1, q_k(r) = round((2^k - 1) r) / (2^k - 1) (arXiv 1606.06160).

    Values lie in [-1, 1], whatever the weight: what follows the layer should normalize. Surrogate: tanh(w) / max |tanh
    w|, differentiated through the maximum too, as q_k alone is passed over; weights that are all 0 count 1/2.

    Args:
        weight: not looked at.
        bits: k = 2, 3, 4, 5, 6 or 8. Of 1 bit the paper takes the sign and mean |w|: use BWN.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        if bits == 1:
            raise ValueError("bits must be 2 or more, got 1: use BWN")
        levels = 2**bits - 1
        table = [2 * i / levels - 1 for i in range(levels + 1)]
        super().__init__(
            Format.lut(bits=bits, table=table, group=None, scale=None, name=f"dorefa{bits}")
        )

    def encode(self, weight: Tensor) -> tuple[QuantTensor, Tensor]:
        """Codes of a table without a scale."""
        levels = 2**self.format.bits - 1
        ratio = (_unit_tanh(weight) / 2 + 0.5) * levels
        return self.blank(weight), ratio.round().to(torch.uint8)

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """tanh(w) / max |tanh w|."""
        return _unit_tanh(weight)


def _unit_tanh(weight: Tensor) -> Tensor:
    t = weight.tanh()
    top = t.abs().max()
    return t / torch.where(top > 0, top, 1.0)


def _ternary_codes(weight: Tensor, above: Tensor) -> Tensor:
    return torch.where(above, weight.sign() + 1, 1.0).to(torch.uint8)


def _scales(qt: QuantTensor) -> Tensor:
    scales = reference.effective_scales(qt)
    assert scales is not None
    return scales


def _check_table(format: Format, table: tuple[float, ...]) -> None:
    if format.table != table or format.scale != "fp32":
        raise ValueError(f"format must have the table {table} and fp32 scales, got {format.name!r}")
