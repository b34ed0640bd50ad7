"""Lloyd's algorithm (1957, IEEE Trans. Inf. Theory 1982), for those who reproduce papers that run it:
`kmeans` finds the best table itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.methods import fitting, grid
from lowbit.weights.quantized import QuantTensor


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    init: str = "linear",
    iterations: int = 300,
    tolerance: float = 1e-4,
    weights: Tensor | None = None,
    seed: int = 0,
) -> QuantTensor:
    """Fits the tables of a format by Lloyd's algorithm and chooses the nearest code of every weight.

    Each iteration moves every entry to the mean of the points that are nearest to it; a point half
    way between two entries belongs to the lower one, and an entry without points stays where it is
    (our reading; scikit-learn moves it to a far point). The starts "linear", "density" and "forgy"
    are those of Deep Compression (arXiv 1510.00149), "kmeans++" is that of Arthur and Vassilvitskii
    (SODA 2007):

    "linear": equal steps from the smallest point to the largest.
    "density": equal steps of the distribution function, at (i + 1/2) / entries (the paper does not
        say where the steps begin).
    "forgy": points drawn without replacement.
    "kmeans++": points drawn one by one, each in proportion to its squared distance from those that
        were drawn before.

    Args:
        weight, format, weights: as in `kmeans.quantize`; importance counts in the starts, too.
            Above 65536 points in bins, as there.
        init: "linear", "density", "forgy" or "kmeans++".
        iterations: at most so many, at least 0.
        tolerance: stop when no entry moves by more than this many standard deviations of the
            points; at least 0.
        seed: of the two starts that draw.

    Raises:
        TypeError, ValueError: as `kmeans.quantize`; `init` is none of these, or a number is out of
            range.
    """
    format = as_format(format)
    fitting.check_fitted(format, "lloyd")
    if init not in INITS:
        raise ValueError(f"init must be one of {sorted(INITS)}, got {init!r}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    grid.check_weight(weight, format)
    weights = fitting.check_importance(weights, weight)
    generator = torch.Generator().manual_seed(seed)

    def solve(problems: fitting.Problems, entries: int) -> Tensor:
        points, count = problems.sorted_points()
        exact = points.double()
        counts = torch.ones_like(exact) if count is None else count
        start = INITS[init](exact, counts, entries, generator)
        return iterate(exact, counts, start, iterations, tolerance)

    qt = grid.start(weight, format)
    fitting.fit_tables(qt, weight, weights, solve)
    grid.fill_codes(qt, weight)
    return qt


def iterate(
    points: Tensor,  # (R, C) fp64, ascending
    count: Tensor,  # (R, C) fp64, some positive in every row
    start: Tensor,  # (R, entries) fp64, ascending
    iterations: int,
    tolerance: float,
) -> Tensor:  # (R, entries) fp64, ascending
    """Lloyd's iterations on every row, each until its own end."""
    zero = points.new_zeros(len(points), 1)
    mass = torch.cat([zero, count.cumsum(1)], 1)
    # About the mean: sums of points far from zero would lose their differences to cancellation.
    mean = (count * points).sum(1, keepdim=True) / mass[:, -1:]
    moment = torch.cat([zero, (count * (points - mean)).cumsum(1)], 1)
    spread = ((count * (points - mean).square()).sum(1, keepdim=True) / mass[:, -1:]).sqrt()
    result, entries = start.clone(), start
    rows = torch.arange(len(points), dtype=torch.int64, device=points.device)
    moving = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(iterations):
        moved = _step(points, mass, moment, mean, entries)
        moved = torch.where(moving[:, None], moved, entries)
        moving = ((moved - entries).abs() > tolerance * spread).any(1)
        result[rows], entries = moved, moved
        # Copying the rows that still move pays off when they are few.
        if 2 * int(moving.sum()) <= len(rows):
            rows = rows[moving]
            tensors = (points, mass, moment, mean, spread, entries, moving)
            points, mass, moment, mean, spread, entries, moving = (t[moving] for t in tensors)
        if not len(rows):
            break
    return result


def _step(points: Tensor, mass: Tensor, moment: Tensor, mean: Tensor, entries: Tensor) -> Tensor:
    """The mean of the points of each entry, from sums of what they count and of their distances."""
    border = (entries[:, 1:] + entries[:, :-1]) / 2
    cut = torch.searchsorted(points, border, right=True)
    cut = torch.nn.functional.pad(
        torch.nn.functional.pad(cut, (1, 0)), (0, 1), value=points.shape[1]
    )
    inside = mass.gather(1, cut).diff(dim=1)
    means = mean + moment.gather(1, cut).diff(dim=1) / inside
    # Rounded sums must not carry a mean out of its cell.
    lowest = points.gather(1, cut[:, :-1].clamp(max=points.shape[1] - 1))
    highest = points.gather(1, (cut[:, 1:] - 1).clamp(min=0))
    return torch.where(inside > 0, means.maximum(lowest).minimum(highest), entries)


def quantiles(points: Tensor, count: Tensor, probability: Tensor) -> Tensor:  # (R, P) fp64
    """The points (R, C), ascending, where the share of `count` reaches each probability, (P,)."""
    share = count.cumsum(1)
    target = (probability.to(share) * share[:, -1:]).contiguous()
    at = torch.searchsorted(share, target)
    return points.gather(1, at.clamp(max=points.shape[1] - 1))


def middles(entries: int) -> Tensor:  # (entries,) fp64
    """(i + 1/2) / entries."""
    return (torch.arange(entries, dtype=torch.float64, device="cpu") + 0.5) / entries


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:  # fp64
    device = generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


def _linear(points: Tensor, count: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    counted = count > 0
    low = torch.where(counted, points, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, points, -torch.inf).amax(1, keepdim=True)
    share = torch.linspace(0, 1, entries, dtype=torch.float64, device=points.device)
    return low + (high - low) * share


def _density(points: Tensor, count: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    return quantiles(points, count, middles(entries))


def _forgy(points: Tensor, count: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    # The order of waiting times is that of drawing without replacement in proportion to `count`.
    uniform = _uniform(points.shape, generator)
    wait = torch.where(count > 0, -torch.log1p(-uniform) / count, torch.inf)
    time, drawn = wait.topk(min(entries, points.shape[1]), dim=1, largest=False)
    # Rows with fewer points that count than entries repeat the first one.
    drawn = torch.where(time < torch.inf, drawn, drawn[:, :1])
    drawn = torch.cat([drawn, drawn[:, :1].expand(-1, entries - drawn.shape[1])], 1)
    return points.gather(1, drawn).sort(dim=1).values


def _plus_plus(points: Tensor, count: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    chance, distance, drawn = count, torch.full_like(points, torch.inf), []
    for _ in range(entries):
        share = chance.cumsum(1)
        uniform = _uniform((len(points), 1), generator)
        at = torch.searchsorted(share, uniform * share[:, -1:], right=True)
        # Where every point is an entry already, any of them will do.
        drawn.append(points.gather(1, at.clamp(max=points.shape[1] - 1)))
        distance = torch.minimum(distance, (points - drawn[-1]).square())
        chance = distance * count
    return torch.cat(drawn, 1).sort(dim=1).values


INITS: dict[str, Callable[[Tensor, Tensor, int, torch.Generator], Tensor]] = {
    "density": _density,
    "forgy": _forgy,
    "kmeans++": _plus_plus,
    "linear": _linear,
}
