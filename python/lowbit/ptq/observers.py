"""Observers: the range of activations from calibration data, for one scale per tensor.

Each sees batches with `update` and then gives a scale and a zero point; what it keeps does not grow
with the data. `calibration.attach` feeds them with the inputs of the linears of a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.methods import clipping
from lowbit.methods.clipping import BINS

# Weight of a new batch in the moving average (FQ-ViT; torch.ao has the same default).
MOMENTUM = 0.01
# Values that are looked at in fp64 at a time.
_SLICE_VALUES = 1 << 20
# The inverse of a scale must be finite in fp32.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Integers low .. high that stand for scale * (q - zero_point)."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, low: float, high: float, bits: int, symmetric: bool) -> Grid:
        """The grid of a range, which is widened to hold 0.

        Symmetric: max(-low, high) / (2^(bits - 1) - 1), codes of that magnitude at most, zero point
        0. Else (high - low) / (2^bits - 1), codes -2^(bits - 1) .. 2^(bits - 1) - 1, and the zero
        point is round(lowest code - low / scale). A range without values but 0 has scale 1 and
        zero point 0; a scale is at least 2^-126.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        top = 2 ** (bits - 1) - 1
        if low == high:
            return cls(1.0, 0, -top if symmetric else -top - 1, top)
        if symmetric:
            return cls(max(max(-low, high) / top, _LEAST_SCALE), 0, -top, top)
        scale = max((high - low) / (2 * top + 1), _LEAST_SCALE)
        zero_point = min(max(round(-top - 1 - low / scale), -top - 1), top)
        return cls(scale, zero_point, -top - 1, top)

    def rounded(self, x: Tensor) -> Tensor:
        """x on the grid, in fp64."""
        q = (x.double() / self.scale).round() + self.zero_point
        return (q.clamp(self.low, self.high) - self.zero_point) * self.scale


class Observer(ABC):
    """Watches values and knows the range to quantize them in."""

    def __init__(self) -> None:
        self._min = self._max = 0.0
        self._seen = False

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes a batch of any shape, floating and finite; an empty one changes nothing.

        Raises:
            TypeError: x is not a floating tensor.
            ValueError: x holds NaN or inf; it is not counted then.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor, got {got}")
        if not x.numel():
            return
        values = x.detach().reshape(-1)
        low, high = (float(v) for v in torch.aminmax(values))
        # NaN in x makes both NaN.
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("calibration input holds NaN or inf")
        self._update(values, low, high)
        self._seen = True

    def grid(self, bits: int = 8, symmetric: bool = True) -> Grid:
        """The integers to quantize to, as `Grid.of` makes them of the range.

        Args:
            bits: 2 to 8.
            symmetric: whether the zero point is 0.

        Raises:
            ValueError: bits are out of range, or nothing was observed.
        """
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits}")
        if not self._seen:
            raise ValueError("calibration is empty: no input has reached this layer")
        return Grid.of(*self._range(bits, symmetric), bits, symmetric)

    @property
    def missing(self) -> str | None:
        """Why there is no range to make a symmetric grid of 8 bits of; None if there is one."""
        if not self._seen:
            return "no input has reached it in calibration"
        return None if any(self._range(8, True)) else "the range of its inputs is 0 in calibration"

    def _update(self, values: Tensor, low: float, high: float) -> None:
        """Takes (count,) values and their range."""
        self._min = min(self._min, low) if self._seen else low
        self._max = max(self._max, high) if self._seen else high

    @abstractmethod
    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]: ...


class MinMaxObserver(Observer):
    """The least and the largest value."""

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        return self._min, self._max


class EMAObserver(MinMaxObserver):
    """Moving averages of the least and the largest value of a batch; the first batch starts them."""

    def __init__(self, momentum: float = MOMENTUM) -> None:
        """`momentum`: what a new batch counts, above 0 and at most 1."""
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
        self.momentum = momentum

    def _update(self, values: Tensor, low: float, high: float) -> None:
        weight = self.momentum if self._seen else 1.0
        self._min += weight * (low - self._min)
        self._max += weight * (high - self._max)


class PercentileObserver(EMAObserver):
    """Moving averages of two quantiles of a batch, 1 - percentile and percentile, as FQ-ViT (arXiv
    2111.13824).
    """

    def __init__(self, percentile: float = clipping.PERCENTILE, momentum: float = MOMENTUM) -> None:
        """`percentile`: above 0.5 and at most 1."""
        super().__init__(momentum)
        clipping.check_percentile(percentile)
        self.percentile = percentile

    def _update(self, values: Tensor, low: float, high: float) -> None:
        below = float(clipping.quantile(values, 1 - self.percentile))
        super()._update(values, below, float(clipping.quantile(values, self.percentile)))


class HistogramObserver(Observer):
    """Counts values in bins over [-top, top], 2048 on either side of 0, in fp64.

    top is the absmax of the first batch that is not all 0; where a later value lies beyond, top
    doubles until it does not, and pairs of bins become one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._top = 0.0
        self._counts = torch.zeros(2 * BINS, dtype=torch.float64, device="cpu")
        self._sums = torch.zeros(2 * BINS, dtype=torch.float64, device="cpu")

    def _update(self, values: Tensor, low: float, high: float) -> None:
        super()._update(values, low, high)
        absmax = max(-low, high)
        self._top = self._top or absmax
        while absmax > self._top:
            self._top *= 2
            index = torch.arange(2 * BINS, dtype=torch.int64, device="cpu")
            index = (index - BINS) // 2 + BINS
            self._counts = torch.zeros_like(self._counts).index_add_(0, index, self._counts)
            self._sums = torch.zeros_like(self._sums).index_add_(0, index, self._sums)
        for part in values.split(_SLICE_VALUES):
            x = part.double()
            index = (x / (self._top or 1.0) * BINS).floor().long().clamp(-BINS, BINS - 1) + BINS
            self._counts += torch.bincount(index, minlength=2 * BINS).cpu()
            self._sums += torch.bincount(index, x, minlength=2 * BINS).cpu()


class KLObserver(HistogramObserver):
    """The threshold of |x| that loses least entropy: `clipping.entropy_threshold`, for 2^(bits - 1)
    levels.

    Interpretation: without symmetry the same threshold cuts off both ends of (min, max).
    """

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        absmax = max(-self._min, self._max)
        if absmax == 0:
            return 0.0, 0.0
        counts = self._counts[BINS:] + self._counts[:BINS].flip(0)
        width = self._top / BINS
        used = min(BINS, int(counts.nonzero().max()) + 1)
        kept = clipping.entropy_threshold(counts[:used], 2 ** (bits - 1))
        top = absmax if kept == used else kept * width
        return max(self._min, -top), min(self._max, top)


class MSEObserver(HistogramObserver):
    """The part of (min, max), or of absmax, whose squared error is least: OMSE as in FQ-ViT.

    The fractions are those of `clipping.least_error`. Interpretation: the error is that of the means
    of all bins, not of the last batch alone.
    """

    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        used = self._counts > 0
        counts = self._counts[used]
        values = self._sums[used] / counts

        def error(low: Tensor, high: Tensor) -> Tensor:
            grid = Grid.of(float(low), float(high), bits, symmetric)
            return (counts * (values - grid.rounded(values)).square()).sum()

        ends = values.new_tensor([self._min, self._max])
        low, high = clipping.least_error(ends[0], ends[1], error)
        return float(low), float(high)


OBSERVERS: dict[str, type[Observer]] = {
    "ema": EMAObserver,
    "kl": KLObserver,
    "minmax": MinMaxObserver,
    "mse": MSEObserver,
    "percentile": PercentileObserver,
}
