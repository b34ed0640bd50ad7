"""Tables from a kernel density of a sample (Seo and Kim, "KDE-based non-uniform quantizer", Applied
Sciences 9(12), 2559, 2019): the fit reads a small part of the points, whatever their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.methods import fitting, kmeans, lloyd
from lowbit.methods.grid import check_weight, fill_codes, start
from lowbit.weights.quantized import QuantTensor

SOLVERS = ("km", "lm")
MIN_SAMPLE = 1000
# Grids that are transformed together hold about this many values in fp64.
_SLICE_VALUES = 1 << 20


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    solver: str = "lm",
    sample: float = 0.001,
    tails: float = 0.001,
    strata: int = 64,
    grid: int | None = None,
    bandwidth: float | None = None,
    seed: int = 0,
) -> QuantTensor:
    """Fits the tables of a format to a density of the weights, and chooses the nearest code of each.

    The paper (of which the abstract is public) estimates the density of a few sampled weights with
    Gaussian kernels, and fits the table to the density by k-means (KDE-KM) or by Lloyd-Max
    (KDE-LM). The rest is our reading. Points are drawn with replacement and counted as in
    `kmeans.quantize`; the density is taken on a grid, which the solvers see as weighted points:
    "km" solves them exactly, "lm" is Lloyd's algorithm from the entries of Panter and Dite, which
    lie as the cube root of the density. A sample of 0.1 % holds hardly any of the far points that
    decide the outer entries, and how many points it has where is noise of some percent. So the
    smallest and the largest points are found in a pass over all of them, count as they are, and
    bound the density, which is reflected at these bounds; a second pass counts the points in strata
    of equal width between the bounds, and the density is scaled to that in each of them.

    Args:
        weight, format: as in `kmeans.quantize`.
        solver: "lm" or "km".
        sample: the part of the points of a table that is drawn, above 0 and at most 1; at least
            1000 points, and all of them where there are no more.
        tails: the part of the points that counts as it is, half of it at either end, from 0 to
            below 1; 0 is the paper's estimate, where the bounds are those of the sample.
        strata: of the density of a sample, at least 1; 1 scales it as a whole, as the paper's.
        grid: points of the grid, at least 2; by default 2 for every point of a table, but from 128
            to 2048.
        bandwidth: of the kernel in standard deviations of the sample, at least 0; by default
            Silverman's, 0.9 min(1, interquartile range / 1.34) n^(-1/5).
        seed: of the sample.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format is not fitted, or an argument is out of
            range.
    """
    format = as_format(format)
    fitting.check_fitted(format, "kde")
    check_weight(weight, format)
    _check_numbers(solver, sample, tails, strata, grid, bandwidth)
    generator = torch.Generator().manual_seed(seed)

    def solve(problems: fitting.Problems, entries: int) -> Tensor:
        drawn = _draw(problems, sample, tails, strata, generator)
        nodes = grid or min(2048, max(128, 2 * problems.size))
        points, count = drawn.density(nodes, bandwidth)
        if solver == "km":
            return kmeans.centers(points.float(), count, entries)
        start = _panter_dite(points, count, entries)
        return lloyd.iterate(points, count, start, iterations=300, tolerance=1e-4)

    qt = start(weight, format)
    fitting.fit_tables(qt, weight, None, solve)
    fill_codes(qt, weight)
    return qt


def _check_numbers(
    solver: str,
    sample: float,
    tails: float,
    strata: int,
    grid: int | None,
    bandwidth: float | None,
) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if not 0 < sample <= 1:
        raise ValueError(f"sample must be above 0 and at most 1, got {sample}")
    if not 0 <= tails < 1:
        raise ValueError(f"tails must be from 0 to below 1, got {tails}")
    if strata < 1:
        raise ValueError(f"strata must be at least 1, got {strata}")
    if grid is not None and grid < 2:
        raise ValueError(f"grid must be at least 2, got {grid}")
    if bandwidth is not None and not 0 <= bandwidth < math.inf:
        raise ValueError(f"bandwidth must be finite and at least 0, got {bandwidth}")


@dataclass(frozen=True)
class _Drawn:
    """Points of R problems, fp64 on the CPU.

    Attributes:
        low, high: the tails, (R, T) each, ascending; with `low_count` and `high_count`.
        body: the sample between them, (R, n); `body_count` is 0 for a point that lies beyond.
        mass: what the points between the tails count, by strata of equal width, (R, S).
    """

    low: Tensor
    low_count: Tensor
    body: Tensor
    body_count: Tensor
    high: Tensor
    high_count: Tensor
    mass: Tensor

    def density(self, nodes: int, bandwidth: float | None) -> tuple[Tensor, Tensor]:
        """Points (R, C), ascending, and what they count: the tails, and a grid of `nodes`."""
        first, last = _bounds(self.low, self.body, self.high)
        share = torch.linspace(0, 1, nodes, dtype=torch.float64, device=first.device)
        x = torch.minimum(first + (last - first) * share, last)
        width = _silverman(self.body, self.body_count, bandwidth)
        step = (last - first) / (nodes - 1)
        step = torch.where(step > 0, step, 1.0)
        rows = torch.arange(len(first), dtype=torch.int64, device=first.device)
        split = rows.split(max(1, _SLICE_VALUES // nodes))
        tensors = (self.body, self.body_count, first, step, width)
        y = torch.cat([_smoothed(nodes, *(t[rows] for t in tensors)) for rows in split])
        # Where the sample has nothing the density is flat.
        y += 1e-9 * y.mean(1, keepdim=True)
        stratum = _stratum(x, first, last, self.mass.shape[1])
        y *= (self.mass / torch.zeros_like(self.mass).scatter_add_(1, stratum, y)).gather(
            1, stratum
        )
        points = torch.cat([self.low, x, self.high], 1)
        return points, torch.cat([self.low_count, y, self.high_count], 1)


def _draw(
    problems: fitting.Problems,
    sample: float,
    tails: float,
    strata: int,
    generator: torch.Generator,
) -> _Drawn:
    size = problems.size
    tail = min(math.ceil(tails * size / 2), (size - 1) // 2)
    n = max(MIN_SAMPLE, math.ceil(sample * size))
    if n < size:
        return _sampled(problems, n, tail, strata, generator)
    points, count = problems.points()
    values, order = points.double().sort(dim=1)
    counts = torch.ones_like(values) if count is None else count.gather(1, order)
    cuts = [tail, size - 2 * tail, tail]
    low, body, high = values.cpu().split(cuts, 1)
    low_count, body_count, high_count = counts.cpu().split(cuts, 1)
    mass = body_count.sum(1, keepdim=True)
    return _Drawn(low, low_count, body, body_count, high, high_count, mass)


def _sampled(
    problems: fitting.Problems, n: int, tail: int, strata: int, generator: torch.Generator
) -> _Drawn:
    drawn, begin = None, 0
    sample: list[_Counted] = []
    low = high = None
    for points, count in problems.parts():
        if drawn is None:
            shape, device = (len(points), n), generator.device
            drawn = torch.randint(
                problems.size, shape, generator=generator, dtype=torch.int64, device=device
            )
            drawn = drawn.sort(dim=1).values.to(points.device)
        # A problem that comes in several parts is alone, so that its row says which indices are here.
        ends = drawn.new_tensor([begin, begin + points.shape[1]])
        first, last = torch.searchsorted(drawn[0], ends).tolist()
        sample.append(_gather(points, count, drawn[:, first:last] - begin))
        begin += points.shape[1]
        low = _extremes(low, points, count, tail, largest=False)
        high = _extremes(high, points, count, tail, largest=True)
    assert low is not None
    assert high is not None
    low_points, low_count = low
    high_points, high_count = (t.flip(1) for t in high)
    body, body_count = (torch.cat(tensors, 1) for tensors in zip(*sample, strict=True))
    bounds = _bounds(low_points, body, high_points)
    body_count = torch.where((body >= bounds[0]) & (body <= bounds[1]), body_count, 0.0)
    mass = torch.zeros(len(body), strata, dtype=torch.float64, device=body.device)
    for points, count in problems.parts():
        stratum = _stratum(points, *bounds, strata)
        own = torch.ones_like(stratum, dtype=torch.float64) if count is None else count
        mass.scatter_add_(1, stratum, own)
    # The tails lie beyond the bounds, or on them.
    mass[:, :1] -= low_count.sum(1, keepdim=True)
    mass[:, -1:] -= high_count.sum(1, keepdim=True)
    tails = (high_points, high_count, mass.clamp(min=0))
    every = (low_points, low_count, body, body_count, *tails)
    return _Drawn(*(t.double().cpu() for t in every))


def _bounds(low: Tensor, body: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:  # (R, 1)
    """Where the density begins and ends."""
    if low.shape[1]:
        return low[:, -1:], high[:, :1]
    return body.amin(1, keepdim=True), body.amax(1, keepdim=True)


def _stratum(points: Tensor, first: Tensor, last: Tensor, strata: int) -> Tensor:  # int64
    """The stratum of each point; the outer ones take what lies beyond them."""
    share = (points - first) / torch.where(last > first, last - first, 1.0)
    return (share * strata).clamp(0, strata - 1).long()


_Counted = tuple[Tensor, Tensor]  # points (R, C) fp32, and what each counts, fp64


def _gather(points: Tensor, count: Tensor | None, at: Tensor) -> _Counted:
    own = points.gather(1, at)
    counts = torch.ones_like(own, dtype=torch.float64) if count is None else count.gather(1, at)
    return own, counts


def _extremes(
    found: _Counted | None, points: Tensor, count: Tensor | None, tail: int, largest: bool
) -> _Counted:
    """The `tail` outermost points of those that were found and of a part, the outermost first."""
    at = points.topk(min(tail, points.shape[1]), dim=1, largest=largest).indices
    new = _gather(points, count, at)
    if found is None:
        return new
    every, counts = (torch.cat(tensors, 1) for tensors in zip(found, new, strict=True))
    at = every.topk(min(tail, every.shape[1]), dim=1, largest=largest).indices
    return every.gather(1, at), counts.gather(1, at)


def _silverman(body: Tensor, count: Tensor, bandwidth: float | None) -> Tensor:  # (R, 1)
    total = count.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    mean = (count * body).sum(1, keepdim=True) / total
    deviation = ((count * (body - mean).square()).sum(1, keepdim=True) / total).sqrt()
    if bandwidth is not None:
        return bandwidth * deviation
    values, order = body.sort(dim=1)
    quartiles = lloyd.quantiles(values, count.gather(1, order), values.new_tensor([0.25, 0.75]))
    spread = quartiles.diff(dim=1) / 1.34
    spread = torch.where(spread > 0, torch.minimum(spread, deviation), deviation)
    # Points that count unequally are worth fewer equal ones.
    share = (count / total).square().sum(1, keepdim=True)
    return 0.9 * spread * share**0.2


def _smoothed(
    nodes: int, body: Tensor, count: Tensor, first: Tensor, step: Tensor, width: Tensor
) -> Tensor:  # (R, nodes)
    """The density on the grid, up to a factor: each point is shared by the two nodes beside it, and
    the convolution is that of a grid that is reflected at both ends. Flat without points.
    """
    place = ((body - first) / step).clamp(0, nodes - 1)
    left = place.floor().clamp(max=nodes - 2)
    part = place - left
    y = torch.zeros(len(body), nodes, dtype=torch.float64, device=body.device)
    y.scatter_add_(1, left.long(), count * (1 - part)).scatter_add_(
        1, left.long() + 1, count * part
    )
    y = torch.where(y.any(1, keepdim=True), y, 1.0)
    frequency = torch.fft.rfftfreq(2 * nodes, dtype=torch.float64, device=body.device)
    wave = 2 * math.pi * frequency / step
    spectrum = torch.fft.rfft(torch.cat([y, y.flip(1)], 1)) * torch.exp(-0.5 * (wave * width) ** 2)
    return torch.fft.irfft(spectrum, n=2 * nodes)[:, :nodes].clamp(min=0)


def _panter_dite(points: Tensor, count: Tensor, entries: int) -> Tensor:  # (R, entries) fp64
    """Entries at equal steps of the integral of the cube root of the density (Panter and Dite 1951),
    where a point (R, C) stands for half of the gaps beside it.
    """
    gap = points.diff(dim=1)
    width = torch.cat([gap[:, :1], (gap[:, 1:] + gap[:, :-1]) / 2, gap[:, -1:]], 1)
    return lloyd.quantiles(points, count ** (1 / 3) * width ** (2 / 3), lloyd.middles(entries))
