"""Binary, ternary and DoReFa weights.

For each: the codes and the scale or table, and the surrogate whose gradient the weight receives. Scales are constants
for the gradient unless a Parameter holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit import reference
from lowbit.formats import Format
from lowbit.methods import grid
from lowbit.methods.bitnet import BINARY
from lowbit.qat.base import STE, WeightQuantizer, set_codes
from lowbit.weights.quantized import QuantTensor


class BWN(STE):
    """alpha * sign(w), alpha = mean |w| of a filter: Binary-Weight-Networks (Rastegari et al. 2016, arXiv 1603.05279).

    The gradient is the paper's, dL/dw = dL/dw^ * (1 / n + alpha * [|w| <= 1]), n the weights that share alpha. With
    `XNORActivation` it is XNOR-Net.

    Args:
        weight: not looked at: alpha follows the weight.
        format: with the table (-1, 1) and the rule "mean"; a group other than the row is our reading.
    """

    def __init__(self, weight: Tensor, format: Format | str = "binary_row_fp32") -> None:
        super().__init__(weight, format, "rtn")
        f = self.format
        if f.table != BINARY or f.scale is None or f.scale_rule != "mean":
            raise ValueError(
                f"format must have the table {BINARY} and scales by the rule 'mean', such as "
                f"'binary', got {f.name!r}"
            )

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """The weight times the paper's factor."""
        k = weight.shape[1]
        scales = reference.effective_scales(qt)
        assert scales is not None
        alpha = reference.per_weight(scales, self.format, k)
        sizes = grid.group_sizes(weight, self.format).to(scales)
        n = reference.per_weight(sizes[None], self.format, k)
        slope = 1 / n + alpha * (weight.detach().abs() <= 1)
        return weight * slope.to(weight.dtype)


class TWN(STE):
    """Ternary weight networks (Li et al. 2016, arXiv 1605.04711): method "twn"; surrogate: the weight.

    Args:
        weight: not looked at.
        format, granularity: as in `quantize.twn`; one scale for the whole weight is the paper's.
    """

    def __init__(
        self,
        weight: Tensor,
        format: Format | str = "ternary_row_fp32",
        granularity: str = "tensor",
    ) -> None:
        super().__init__(weight, format, "twn", granularity=granularity)


class BitNet(STE):
    """Weights of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764), or with a binary format of BitNet (arXiv
    2310.11453): method "bitnet"; surrogate: the weight.

    Args:
        weight: not looked at.
        format: as in `quantize.bitnet`.
    """

    def __init__(self, weight: Tensor, format: Format | str = "ternary_row_fp32") -> None:
        super().__init__(weight, format, "bitnet")


class TTQ(WeightQuantizer):
    """Trained ternary quantization (Zhu et al. 2017, arXiv 1612.01064): -wn, 0, wp with learned wn and wp.

    delta = threshold * max |w|. Gradients: dL/dwp = sum of dL/dw^ over w > delta; dL/dwn = -sum over w < -delta (the
    sign is our reading: the derivative of -wn); dL/dw = dL/dw^ times wp, 1 and wn above, between and below.

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
        grid.check_weight(weight, self.format)
        self.threshold = threshold
        w = weight.detach().double()
        codes = self._codes(w)
        wn, wp = (
            torch.where(codes == code, w.abs(), 0.0).sum() / (codes == code).sum().clamp(min=1)
            for code in (0, 2)
        )
        self.wp, self.wn = nn.Parameter(wp.float()), nn.Parameter(wn.float())

    def encode(self, weight: Tensor) -> QuantTensor:
        """Codes by the threshold, the table (-wn, 0, wp, 0)."""
        qt = grid.empty(weight, self.format)
        zero = torch.zeros_like(self.wp)
        grid.set_table(qt, torch.stack([-self.wn, zero, self.wp, zero]).detach())
        return set_codes(qt, self._codes(weight))

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """Linear in weight, wp and wn, with the gradients above."""
        above, below = codes == 2, codes == 0
        slope = torch.where(above, self.wp.detach(), torch.where(below, self.wn.detach(), 1.0))
        learned = torch.where(above, self.wp, torch.where(below, -self.wn, 0.0))
        return weight * slope.to(weight.dtype) + learned.to(weight.dtype)

    def _codes(self, weight: Tensor) -> Tensor:
        delta = self.threshold * weight.abs().max()
        return 1 + (weight > delta).to(torch.uint8) - (weight < -delta).to(torch.uint8)


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

    def encode(self, weight: Tensor) -> QuantTensor:
        """Codes of a table without a scale."""
        levels = 2**self.format.bits - 1
        ratio = (_unit_tanh(weight) / 2 + 0.5) * levels
        return set_codes(grid.empty(weight, self.format), ratio.round().to(torch.uint8))

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """tanh(w) / max |tanh w|."""
        return _unit_tanh(weight)


def _unit_tanh(weight: Tensor) -> Tensor:
    t = weight.tanh()
    top = t.abs().max()
    return t / torch.where(top > 0, top, 1.0)
