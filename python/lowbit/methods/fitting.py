"""Groups the weights of a fitted format by the table that they share, as one-dimensional clustering problems.

A point of a problem is a weight divided by its stored scale, with the count importance * scale^2: the sum of count *
(point - entry)^2 is the squared error of the weight. Problems of one size come together, and their points in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format
from lowbit.methods import grid
from lowbit.weights.quantized import QuantTensor

MAX_POINTS = 65536
Part = tuple[Tensor, Tensor | None]  # points (R, C) fp32, and their counts, fp64 or None for 1


@dataclass(frozen=True)
class Problems:
    """R problems of `size` points each.

    Attributes:
        parts: gives the points, part by part along their dimension; may be called again. In every
            problem some point counts more than 0.
    """

    size: int
    parts: Callable[[], Iterable[Part]]

    def points(self) -> tuple[Tensor, Tensor | None]:
        """All points, (R, size) fp32, and what they count, (R, size) fp64 or None for 1."""
        parts = list(self.parts())
        counts = [count for _, count in parts if count is not None]
        return torch.cat([p for p, _ in parts], 1), torch.cat(counts, 1) if counts else None

    def sorted_points(self, most: int | None = None) -> tuple[Tensor, Tensor | None]:
        """As `points`, in ascending order and on the CPU, but never more than `most`, or MAX_POINTS.

        More of them are averaged in as many bins of equal width in v / (|v| + rms), which keeps
        both the bulk and far outliers apart; an empty bin counts 0.
        """
        most = most or MAX_POINTS
        points, count = self.points() if self.size <= most else self._bins(most)
        values, order = points.sort(dim=1)
        return values.cpu(), None if count is None else count.gather(1, order).cpu()

    def _bins(self, bins: int) -> tuple[Tensor, Tensor]:
        total = moment = torch.zeros((), dtype=torch.float64, device="cpu")
        for points, count in self.parts():
            square = points.double().square()
            total = total + (points.shape[1] if count is None else count.sum(1))
            moment = moment + (square if count is None else square * count).sum(1)
        rms = (moment / total).sqrt()
        rms = torch.where(rms > 0, rms, 1.0)[:, None]
        rows = len(rms)
        counts = torch.zeros(rows * bins, dtype=torch.float64, device=rms.device)
        sums = torch.zeros_like(counts)
        first = bins * torch.arange(rows, dtype=torch.int64, device=rms.device)[:, None]
        for points, count in self.parts():
            exact = points.double()
            key = exact / (exact.abs() + rms)
            index = ((key + 1) * (bins / 2)).long().clamp(0, bins - 1) + first
            one = torch.ones_like(exact) if count is None else count
            counts += torch.bincount(index.flatten(), one.flatten(), len(counts))
            sums += torch.bincount(index.flatten(), (one * exact).flatten(), len(counts))
        mean = torch.where(counts > 0, sums / counts, 0.0).float()
        return mean.view(rows, -1), counts.view(rows, -1)


Solver = Callable[[Problems, int], Tensor]  # R problems, entries -> (R, entries), on any device


def check_fitted(format: Format, method: str) -> None:
    """Raises ValueError unless the tables of `format` are fitted to the weight."""
    if not format.fitted:
        raise ValueError(
            f"method {method!r} fits tables and format {format.name!r} has its own values: "
            "use 'rtn', or a format without a table"
        )


def check_importance(weights: Tensor | None, weight: Tensor) -> Tensor | None:  # (N, K)
    """The importance of each weight as (N, K); raises unless it is that or (K,), finite, and not
    negative.
    """
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.dtype not in grid.WEIGHT_DTYPES:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating tensor, got {got}")
    if weights.shape == weight.shape[1:]:
        weights = weights.expand(weight.shape)
    if weights.shape != weight.shape or weights.device != weight.device:
        raise ValueError(
            f"weights must have the shape and device of weight, {tuple(weight.shape)} on "
            f"{weight.device}, or the shape of a row, got {tuple(weights.shape)} on {weights.device}"
        )
    for rows, w in grid.slices(weights):
        bad = ~(torch.isfinite(w) & (w >= 0))
        if bool(bad.any()):
            n, k = (int(i) for i in bad.nonzero()[0])
            value = float(weights[rows.start + n, k])
            raise ValueError(
                f"weights[{rows.start + n}, {k}] = {value}, "
                "importance must be finite in fp32 and not negative"
            )
    return weights


def fit_tables(qt: QuantTensor, weight: Tensor, importance: Tensor | None, solve: Solver) -> None:
    """Fills the tables of `qt` for the scales that it has; where all points of a problem would
    count 0 each counts 1. Of a pair, a table that no group has becomes as the other.
    """
    table, scope = qt.tensors["table"], qt.format.table_scope
    entries = table.shape[-1]
    if scope == "tensor":
        table.copy_(solve(whole(qt, weight, importance), entries)[0])
        return
    if scope == "pair":
        members = [chosen_weights(qt, number) for number in range(2)]
        for number, mine in enumerate(members):
            counted = mine if bool(mine.any()) else members[1 - number]
            counted = counted if importance is None else counted * importance
            table[number].copy_(solve(whole(qt, weight, counted), entries)[0])
        return
    for rows, points, count in weight_points(qt, weight, importance):
        if scope == "row":
            table[rows] = solve(_single(points, count), entries).to(table)
            continue
        begin = 0
        counts = None if count is None else grid.group_parts(count, qt.format)
        for i, part in enumerate(grid.group_parts(points, qt.format)):
            own = None if counts is None else counts[i].flatten(0, 1)
            tables = solve(_single(part.flatten(0, 1), own), entries)
            groups = slice(begin, begin + part.shape[1])
            table[rows, groups] = tables.unflatten(0, part.shape[:2]).to(table)
            begin = groups.stop


def chosen_weights(qt: QuantTensor, number: int) -> Tensor:  # (N, K) bool
    """The weights of the groups that have one of a pair of tables."""
    chosen = reference.chosen_tables(qt.tensors["scales"], qt.format)
    assert chosen is not None
    return reference.per_weight(chosen == number, qt.format, qt.shape[1]).expand(qt.shape)


def weight_points(
    qt: QuantTensor, weight: Tensor, importance: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slice by slice: rows, points (R, K) fp32, and what each counts, (R, K) fp64 or None for 1."""
    scales = reference.effective_scales(qt)
    for rows, w in grid.slices(weight):
        points = grid.scaled(w, qt.format, None if scales is None else scales[rows])
        count = None if importance is None else importance[rows].double()
        if scales is not None:
            group = reference.group_index(qt.format, w.shape[1], w.device)
            square = scales[rows].double().square()[:, group]
            count = square if count is None else count * square
        yield rows, points, count


def whole(qt: QuantTensor, weight: Tensor, importance: Tensor | None) -> Problems:
    """All weights as one problem."""
    counts = any(c is None or bool(c.any()) for _, _, c in weight_points(qt, weight, importance))

    def parts() -> Iterator[Part]:
        for _, points, count in weight_points(qt, weight, importance):
            own = count.reshape(1, -1) if count is not None and counts else None
            yield points.reshape(1, -1), own

    return Problems(weight.numel(), parts)


def _single(points: Tensor, count: Tensor | None) -> Problems:
    if count is not None:
        count = torch.where(count.any(1, keepdim=True), count, 1.0)
    return Problems(points.shape[1], lambda: [(points, count)])
