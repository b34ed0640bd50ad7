"""k-means tables: for the scales that are stored, the tables that minimise sum importance * (W -
W^)^2.

One-dimensional k-means is solved exactly by dynamic programming (csrc/kmeans.h); a point of the
problem is a weight over its scale and counts importance * scale^2. Above 65536 points (a whole
matrix, or a very long row) the points are first averaged in 65536 bins of equal width in v / (|v| +
rms), which keeps both the bulk and far outliers apart: the only thing given up is the freedom to
split a bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lowbit import _C, reference
from lowbit.formats import Format, as_format
from lowbit.quantize import rtn
from lowbit.tensor import QuantTensor

MAX_POINTS = 65536
Part = tuple[Tensor, Tensor | None]  # points, and what each counts
# (points (R, C) fp32, counts (R, C) fp64 or None, entries) -> tables (R, entries) fp32 on the CPU
Solve = Callable[[Tensor, Tensor | None, int], Tensor]


@torch.no_grad()
def quantize(weight: Tensor, format: Format | str, *, weights: Tensor | None = None) -> QuantTensor:
    """Fits the table of a format to `weight` and chooses the nearest code of every weight.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32. Scales as
            in `rtn`, where absmax is scaled to 1.
        format: a fitted format or its name ("kmeans4", "kmeans3_pr", `Format.lut(bits=3)`); its
            `table_scope` says whether the weight, each row or each group has a table.
        weights: the importance of each weight, finite and not negative: (N, K), a diagonal Fisher
            matrix, say (SqueezeLLM, arXiv 2306.07629), or (K,), alike for all rows, as the diagonal
            of the second moment of the inputs. A table whose points all count 0 is fitted as if each
            counted 1.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format is not fitted; `weights` has another
            shape, another dtype or a value that is not allowed.
    """
    format = as_format(format)
    if not format.fitted:
        raise ValueError(
            f"method 'kmeans' fits tables and format {format.name!r} has its own values: "
            "use 'rtn', or a format without a table"
        )
    rtn.check_weight(weight, format)
    weights = check_importance(weights, weight)
    qt = rtn.start(weight, format)
    fit_tables(qt, weight, weights)
    rtn.fill_codes(qt, weight)
    return qt


def check_importance(weights: Tensor | None, weight: Tensor) -> Tensor | None:  # (N, K)
    """The importance of each weight; raises TypeError or ValueError as `quantize` says."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.dtype not in rtn.WEIGHT_DTYPES:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating tensor, got {got}")
    if weights.shape == weight.shape[1:]:
        weights = weights.expand(weight.shape)
    if weights.shape != weight.shape or weights.device != weight.device:
        raise ValueError(
            f"weights must have the shape and device of weight, {tuple(weight.shape)} on "
            f"{weight.device}, or the shape of a row, got {tuple(weights.shape)} on {weights.device}"
        )
    for rows, w in rtn.slices(weights):
        bad = ~(torch.isfinite(w) & (w >= 0))
        if bool(bad.any()):
            n, k = (int(i) for i in bad.nonzero()[0])
            value = float(weights[rows.start + n, k])
            raise ValueError(
                f"weights[{rows.start + n}, {k}] = {value}, "
                "importance must be finite in fp32 and not negative"
            )
    return weights


def _points(
    qt: QuantTensor, weight: Tensor, importance: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slice by slice: rows, points (R, K) fp32, and what each counts, (R, K) fp64 or None for 1."""
    scales = reference.effective_scales(qt)
    for rows, w in rtn.slices(weight):
        points = rtn.scaled(w, qt.format, None if scales is None else scales[rows])
        count = None if importance is None else importance[rows].double()
        if scales is not None:
            group = reference.group_index(qt.format, w.shape[1], w.device)
            square = scales[rows].double().square()[:, group]
            count = square if count is None else count * square
        yield rows, points, count


def fit_tables(
    qt: QuantTensor, weight: Tensor, importance: Tensor | None, solve: Solve | None = None
) -> None:
    """Fits and stores the tables of `qt`, one for each scope: k-means, or what `solve` makes of the
    points (R, C) of R tables.
    """
    fit = {"tensor": _tensor_table, "row": _row_tables, "group": _group_tables}
    fit[qt.format.table_scope](qt, weight, importance, solve or _solve)


def _tensor_table(qt: QuantTensor, weight: Tensor, importance: Tensor | None, solve: Solve) -> None:
    def parts() -> Iterator[Part]:
        for _, points, count in _points(qt, weight, importance):
            yield points, count

    if weight.numel() > MAX_POINTS:
        table = solve(*_bin(parts), 2**qt.format.bits)
    else:
        slices = list(parts())
        points = torch.cat([p for p, _ in slices]).view(1, -1)
        counts = [c for _, c in slices if c is not None]
        count = torch.cat(counts).view(1, -1) if counts else None
        table = solve(points, count, 2**qt.format.bits)
    qt.tensors["table"].copy_(table[0])


def _row_tables(qt: QuantTensor, weight: Tensor, importance: Tensor | None, solve: Solve) -> None:
    for rows, points, count in _points(qt, weight, importance):
        qt.tensors["table"][rows] = solve(points, count, 2**qt.format.bits).to(qt.device)


def _group_tables(qt: QuantTensor, weight: Tensor, importance: Tensor | None, solve: Solve) -> None:
    entries = 2**qt.format.bits
    for rows, points, count in _points(qt, weight, importance):
        tables = []
        counts = None if count is None else rtn.group_parts(count, qt.format)
        for i, part in enumerate(rtn.group_parts(points, qt.format)):
            own = None if counts is None else counts[i].flatten(0, 1)
            tables.append(solve(part.flatten(0, 1), own, entries).unflatten(0, part.shape[:2]))
        qt.tensors["table"][rows] = torch.cat(tables, 1).to(qt.device)


def _solve(
    points: Tensor, count: Tensor | None, k: int
) -> Tensor:  # (R, C) -> (R, k) fp32 on the CPU
    """The best k centers of every row."""
    if points.shape[1] > MAX_POINTS:
        rows = []
        for r in range(points.shape[0]):
            row = [(points[r], None if count is None else count[r])]
            rows.append(_solve(*_bin(row.__iter__), k))
        return torch.cat(rows)
    values, order = points.sort(dim=1)
    weights = None if count is None else count.gather(1, order).cpu().numpy()
    centers = _C.kmeans_rows(values.cpu().numpy(), weights, k, torch.get_num_threads())
    return torch.from_numpy(centers)


def _bin(parts: Callable[[], Iterable[Part]]) -> tuple[Tensor, Tensor]:
    """Averages points in bins: values and counts, (1, at most MAX_POINTS); reads `parts` twice."""
    total = moment = 0.0
    for points, count in parts():
        square = points.double().square()
        total += float(count.sum()) if count is not None else points.numel()
        moment += float((square if count is None else square * count).sum())
    if total == 0:
        return _bin(lambda: ((points, None) for points, _ in parts()))
    rms = math.sqrt(moment / total) or 1.0
    weight = torch.zeros(MAX_POINTS, dtype=torch.float64)
    weighted = torch.zeros(MAX_POINTS, dtype=torch.float64)
    for points, count in parts():
        flat = points.flatten().double()
        key = flat / (flat.abs() + rms)
        index = ((key + 1) * (MAX_POINTS / 2)).long().clamp(0, MAX_POINTS - 1)
        counts = torch.ones_like(flat) if count is None else count.flatten()
        weight += torch.bincount(index, counts, MAX_POINTS).cpu()
        weighted += torch.bincount(index, counts * flat, MAX_POINTS).cpu()
    used = weight > 0
    return (weighted[used] / weight[used]).float().view(1, -1), weight[used].view(1, -1)
