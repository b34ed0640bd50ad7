"""LSQ, learned step sizes (Esser et al. 2020, arXiv 1902.08153), for weights in any table and for activations.

With v = x / s and Q(v) the nearest value of the table, x^ = s * Q(v). Where v lies inside the table:
    dx^/dx = 1    dx^/ds = Q(v) - v
and outside dx^/dx = 0, dx^/ds = Q(v). The gradient of s is scaled by 1 / sqrt(Qp * number of values), Qp the largest
value of the table; s starts at 2 mean |x| / sqrt(Qp).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from lowbit import reference
from lowbit.formats import Format
from lowbit.methods import grid
from lowbit.nn.leaf import Proxy, node_of
from lowbit.qat.activations import ActivationQuantizer
from lowbit.qat.base import WeightQuantizer, scale_gradient, straight_through
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor

_FLOAT_SCALES = ("fp32", "fp16", "bf16")


class LSQ(WeightQuantizer):
    """Weights with learned steps.

    The paper has integers and one step per layer. That a step may belong to a group and the table may be any is our
    reading: the formulas are the same. A step that the format stores in fewer bits than fp32 is rounded to them, and
    the gradient is passed straight through.

    Args:
        weight: (N, K), what the steps start from; a group of zeros starts with step 1.
        format: without zeros and with a table of its own, whose largest value is positive: integers, "nf4",
            "ternary"; scales are fp32, fp16 or bf16.
        granularity: one step per "tensor", as in the paper, or per "group" of the format.

    Attributes:
        step: Parameter (1, 1) or (N, groups) fp32.
    """

    _grad_scale: Tensor

    def __init__(
        self, weight: Tensor, format: Format | str = "int4_row_fp32", granularity: str = "tensor"
    ) -> None:
        super().__init__(format)
        per_tensor = grid.check_granularity(granularity, self.format)
        f = self.format
        if f.fitted or f.zero is not None or f.scale not in _FLOAT_SCALES:
            raise ValueError(
                f"format must have a table, no zeros and scales in {_FLOAT_SCALES}, got {f.name!r}"
            )
        grid.check_weight(weight, f)
        table = grid.fixed_table(f, weight.device)
        table = table[table.isfinite()]
        self._low, self._high = float(table.min()), float(table.max())
        if self._high <= 0:
            raise ValueError(f"the largest value of format {f.name!r} must be positive")
        by_mean = dataclasses.replace(f, scale_rule="mean")
        mean = grid.ranges(weight.detach(), by_mean, per_tensor)[1].float()
        step = 2 * mean / math.sqrt(self._high)
        sizes = grid.group_sizes(weight, f).float()
        if per_tensor:
            step, sizes = step[:1, :1], sizes.new_tensor(weight.numel())
        self.step = nn.Parameter(torch.where(step > 0, step, 1.0))
        self.register_buffer("_grad_scale", (sizes * self._high).rsqrt(), persistent=False)

    def encode(self, weight: Tensor) -> QuantTensor:
        """The nearest codes for the steps."""
        qt = grid.empty(weight, self.format)
        stored = self.step.detach().to(SCALE_DTYPES[self.format.scale or ""])
        _check_positive(stored)
        qt.tensors["scales"].copy_(stored.expand_as(qt.tensors["scales"]))
        grid.fill_codes(qt, weight)
        return qt

    def surrogate(self, weight: Tensor, qt: QuantTensor, codes: Tensor) -> Tensor:
        """Linear in weight and step, with the gradients of LSQ."""
        k = weight.shape[1]
        scales = reference.effective_scales(qt)
        v = grid.scaled(weight.detach().float(), self.format, scales)
        quantized = reference.code_values(codes, self.format, None)
        step = scale_gradient(self.step, self._grad_scale).expand_as(qt.tensors["scales"])
        return _surrogate(
            weight, reference.per_weight(step, self.format, k), v, quantized, self._low, self._high
        )


class LSQActivation(ActivationQuantizer):
    """Activations with one learned step; the step starts from the first batch in training.

    The number of values that scales the gradient is that of one sample (the paper's features of a
    layer): all dimensions but the first.

    Args:
        bits: 1 to 8, the values are 0 .. 2^bits - 1; with `signed`, 2 to 8 and -2^(bits - 1) .. 2^(bits - 1) - 1.
        signed: whether activations may be negative.

    Attributes:
        step: Parameter () fp32.
    """

    started: Tensor

    def __init__(self, bits: int, signed: bool = False) -> None:
        super().__init__()
        if not isinstance(bits, int) or not 1 + signed <= bits <= 8:
            raise ValueError(f"bits must be {1 + signed} to 8, got {bits!r}")
        self.bits, self.signed = bits, signed
        self._zeros = 0  # batches in training mode that could not start the step
        self._low = -(2 ** (bits - 1)) if signed else 0
        self._high = 2 ** (bits - signed) - 1
        device = torch.get_default_device()
        self.step = nn.Parameter(torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """step * clamp(round(x / step)) in the dtype of x.

        Raises:
            ValueError: no batch was seen in training, or the step is no longer positive.
        """
        if isinstance(x, Proxy):
            return node_of(self, x)
        if not self.started:
            self._start(x)
        _check_positive(self.step)
        with torch.no_grad():
            v = x.float() / self.step
            quantized = v.round().clamp(self._low, self._high)
            values = (quantized * self.step).to(x.dtype)
        factor = 1 / math.sqrt(self._high * max(1, x[:1].numel()))
        step = scale_gradient(self.step, factor)
        return straight_through(_surrogate(x, step, v, quantized, self._low, self._high), values)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if not self.training:
            seen = (
                f"the {self._zeros} batches seen in training mode held only zeros"
                if self._zeros
                else "no batch was seen in training mode"
            )
            raise ValueError(
                f"step has no value yet: it starts from the mean magnitude of x, and {seen}; run one "
                "with other values in training mode first"
            )
        mean = x.float().abs().mean()
        if not bool(torch.isfinite(mean)):
            raise ValueError(
                "x must be finite and not empty: the step starts from its mean magnitude"
            )
        if not mean > 0:
            self._zeros += 1
            return
        self.step.copy_(2 * mean / math.sqrt(self._high))
        self.started.fill_(True)

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, signed={self.signed}"


def _surrogate(
    x: Tensor, step: Tensor, v: Tensor, quantized: Tensor, low: float, high: float
) -> Tensor:
    inside = (v > low) & (v < high)
    slope = quantized - torch.where(inside, v, 0.0)
    return x * inside + (step * slope).to(x.dtype)


def _check_positive(step: Tensor) -> None:
    if not bool((step > 0).all() & torch.isfinite(step).all()):
        raise ValueError(
            f"step must be positive and finite, got {step.min().item():g}: lower its learning rate"
        )
