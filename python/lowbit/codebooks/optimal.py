"""Tables of least error: Lloyd-Max for a distribution, and tables for weights that are divided by
the absmax of their block.

Both are one problem: entries c_i, cells that meet half way between them, and in every cell the mean
(L2) or the median (L1) at its entry. Newton's method on these conditions, with Lloyd steps on the
way to where it converges.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.codebooks.distributions import Array, Distribution, Normal, StudentT
from lowbit.codebooks.tables import Table, as_table, check_bits

ERRORS = ("l1", "l2")
_NODES = 400
_STEPS = 2000
# Of the largest entry; fp32 has 6e-8.
_PRECISION = 1e-9
_LEAST_PART = 0.05


def lloyd_max(levels: int, distribution: Distribution | None = None) -> Table:
    """The table of least mean squared error for a variable (Max 1960, Lloyd 1982), in units of the
    distribution.

    Args:
        levels: entries, 2 to 256.
        distribution: unimodal, of finite variance; N(0, 1) by default.
    """
    _check_int("levels", levels, 2, 256)
    source = distribution or Normal()
    if isinstance(source, StudentT) and source.nu <= 2:
        raise ValueError(f"distribution must have a variance, got {source}")
    low, high = source.ppf(np.array([1e-9, 1 - 1e-9]))
    grid = (low + high) / 2 + (high - low) / 2 * np.sinh(np.linspace(-8, 8, 4097)) / np.sinh(8)
    # Panter and Dite: many entries lie as the cube root of the density does.
    density = np.cbrt(source.pdf(grid))
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) * np.diff(grid))])
    start = np.interp((np.arange(levels) + 0.5) / levels * share[-1], share, grid)
    edges = (float(source.ppf(np.float64(0.0))), float(source.ppf(np.float64(1.0))))
    return as_table(_solve(source, start, edges, (None, None), "l2"))


def absmax_optimal(
    bits: int, block: int, distribution: Distribution | None = None, error: str = "l2"
) -> Table:
    """The table of least error for w / max |w|, w in blocks of independent values.

    It holds -1, 0 and 1, as NF and AF do, with one entry more above 0 than below it.

    Args:
        bits: 3 to 8.
        block: weights that share an absmax, from 2.
        distribution: symmetric about 0, of any scale; N(0, 1) by default.
        error: "l2", the mean squared error of w / absmax, or "l1", its mean absolute error.
    """
    return _absmax_table(bits, block, distribution, error, zero_is_edge=False)


def af(bits: int, block: int, distribution: Distribution | None = None) -> Table:
    """AbnormalFloat (Yoshida, arXiv 2306.06965) for blocks of `block` weights of N(0, 1).

    As the author's generator makes it: every entry but -1, 0 and 1 is the median of its cell, and
    the cells next to 0 begin at 0. Where they begin half way to the entry 0 the table is
    `absmax_optimal(..., error="l1")`, which has a smaller error.
    """
    return _absmax_table(bits, block, distribution, "l1", zero_is_edge=True)


def absmax_error(
    table: Table, block: int, distribution: Distribution | None = None, error: str = "l2"
) -> float:
    """The expected |x - nearest entry| ("l1") or its square ("l2") of x = w / max |w| with w in
    blocks; the entries are taken as they are, so that a table for absmax holds -1 and 1.
    """
    _check_error(error)
    source = AbsmaxScaled(block, distribution or Normal())
    entries = np.unique(np.asarray(table, dtype=np.float64))
    if entries.ndim != 1 or entries.size == 0 or not np.isfinite(entries).all():
        raise ValueError(f"table must hold finite values, got {table}")
    cuts = np.concatenate([[-1, 1], entries, (entries[1:] + entries[:-1]) / 2])
    cuts = np.unique(cuts[np.abs(cuts) <= 1])
    x, weight = np.polynomial.legendre.leggauss(12)
    x = (cuts[:-1, None] * (1 - x) + cuts[1:, None] * (1 + x)) / 2
    weight = np.diff(cuts)[:, None] / 2 * weight

    def distance(values: Array) -> Array:
        gap = np.abs(values[..., None] - entries).min(-1)
        return gap if error == "l1" else gap**2

    inside = float((distance(x) * source.pdf(x) * weight).sum())
    ends = float(distance(np.array([-1.0, 1.0])).mean())
    return inside * (block - 1) / block + ends / block


def _absmax_table(
    bits: int, block: int, distribution: Distribution | None, error: str, zero_is_edge: bool
) -> Table:
    check_bits(bits, 3, 8)
    _check_error(error)
    source = AbsmaxScaled(block, distribution or Normal())
    zero = None if zero_is_edge else 0.0
    halves = []
    for count in (2 ** (bits - 1) - 2, 2 ** (bits - 1) - 1):  # entries inside (0, 1)
        start = source.half_ppf(np.arange(1, count + 1) / (count + 1))
        halves.append(_solve(source, start, (0.0, 1.0), (zero, 1.0), error))
    return as_table([-1.0, *(-halves[0]), 0.0, *halves[1], 1.0])


@dataclass(frozen=True)
class AbsmaxScaled:
    """x = w / max |w| for the weights of a block that are not its largest, w symmetric about 0.

    Given the maximum m the others are independent with the distribution of w cut off at +-m; u =
    P(max < m) is uniform, and the integral over u is a Gauss-Legendre sum. One weight in `block` is
    at +-1 besides.
    """

    block: int
    source: Distribution

    def __post_init__(self) -> None:
        _check_int("block", self.block, 2, 2**31)

    def pdf(self, x: Array) -> Array:
        """The density in (-1, 1)."""
        m, below, weight = _nodes(self.block, self.source)
        return (m * self.source.pdf(x[..., None] * m) / below) @ weight

    def cdf(self, x: Array) -> Array:
        """The probability of values up to x, x in [-1, 1]."""
        m, below, weight = _nodes(self.block, self.source)
        return 0.5 + ((self.source.cdf(x[..., None] * m) - 0.5) / below) @ weight

    def sf(self, x: Array) -> Array:
        """The probability of values above x, by symmetry."""
        return self.cdf(-x)

    def partial_mean(self, x: Array) -> Array:
        """The integral of t * pdf(t) from 0 to x."""
        m, below, weight = _nodes(self.block, self.source)
        value = self.source.partial_mean(x[..., None] * m) - self.source.partial_mean(np.zeros(1))
        return (value / m / below) @ weight

    def half_ppf(self, p: Array) -> Array:
        """Roughly the quantiles of |x|."""
        grid = np.linspace(0, 1, 2049)
        return np.interp(p, 2 * self.cdf(grid) - 1, grid)


@functools.lru_cache(maxsize=16)
def _nodes(block: int, source: Distribution) -> tuple[Array, Array, Array]:
    """The maximum, the probability that |w| is below it, and what the node counts."""
    x, weight = np.polynomial.legendre.leggauss(_NODES)
    s = (1 + x) / 2
    # u = s^2 (3 - 2 s): the derivative is 0 at both ends, where m is singular.
    u, weight = s * s * (3 - 2 * s), weight / 2 * 6 * s * (1 - s)
    # 1 - u^(1 / block) without cancellation: the upper quantile is that of a small number.
    above = -np.expm1(np.log(u) / block)
    return -source.ppf(above / 2), 1 - above, weight


def _solve(
    source: Any,
    start: Array,
    edges: tuple[float, float],
    ends: tuple[float | None, float | None],
    error: str,
) -> Array:
    """The entries of least error.

    Args:
        source: a Distribution, or AbsmaxScaled.
        start: ascending, inside the edges.
        edges: where the first cell begins and the last one ends, if no fixed entry is there.
        ends: a fixed entry before the first and after the last entry, or None.
    """
    c = np.sort(start)
    for _ in range(_STEPS):
        b = _borders(c, edges, ends)
        mass, f = _masses(source, b), source.pdf(np.where(np.isfinite(b), b, 0.0))
        # Borders move by half of what the entries beside them do, and the outermost may not move.
        moves = np.full(b.size, 0.5)
        moves[[0, -1]] = [0.0 if end is None else 0.5 for end in ends]
        if error == "l2":
            mean = np.diff(source.partial_mean(b)) / np.maximum(mass, 1e-300)
            residual = mass * (c - mean)
            slope = moves * f
            gap = np.where(np.isfinite(b), b, 0.0)
            left, right = (c - gap[:-1]) * slope[:-1], (gap[1:] - c) * slope[1:]
            diagonal, lower, upper = mass - left - right, -left, -right
        else:
            residual = source.cdf(c) - (source.cdf(b[:-1]) + source.cdf(b[1:])) / 2
            slope = moves * f / 2
            diagonal, lower, upper = source.pdf(c) - slope[:-1] - slope[1:], -slope[:-1], -slope[1:]
        jacobian = np.diag(diagonal) + np.diag(lower[1:], -1) + np.diag(upper[:-1], 1)
        change = np.linalg.solve(jacobian, residual)
        if np.abs(change).max() < _PRECISION * np.abs(c).max():
            return c - change
        # A Newton step goes half of the way to a neighbour at most; where it does not lead downhill,
        # or hardly anywhere, a Lloyd step does.
        gaps = np.diff(np.concatenate([[edges[0]], c, [edges[1]]]))
        room = np.minimum(gaps[:-1], gaps[1:]) / 2
        part = min(1.0, float((room / np.maximum(np.abs(change), 1e-300)).min()))
        if residual @ change > 0 and part > _LEAST_PART:
            c = c - part * change
        elif error == "l2":
            c = mean
        else:
            c = _medians(source, b)
    raise ValueError(f"no table of {c.size} entries was found for {source}")


def _borders(
    c: Array, edges: tuple[float, float], ends: tuple[float | None, float | None]
) -> Array:
    first = edges[0] if ends[0] is None else (ends[0] + c[0]) / 2
    last = edges[1] if ends[1] is None else (ends[1] + c[-1]) / 2
    return np.concatenate([[first], c[1:] / 2 + c[:-1] / 2, [last]])


def _masses(source: Any, b: Array) -> Array:
    """The probability of each cell. From above where the cell lies there: differences of a `cdf` near
    1 would leave the outer cells of a long tail few digits.
    """
    from_below, from_above = np.diff(source.cdf(b)), -np.diff(source.sf(b))
    return np.where(b[:-1] < 0, from_below, from_above)


def _medians(source: AbsmaxScaled, b: Array) -> Array:
    """The median of each cell: by bisection."""
    low, high = b[:-1], b[1:]
    target = (source.cdf(low) + source.cdf(high)) / 2
    for _ in range(30):
        middle = (low + high) / 2
        below = source.cdf(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _check_error(error: str) -> None:
    if error not in ERRORS:
        raise ValueError(f"error must be one of {ERRORS}, got {error!r}")
