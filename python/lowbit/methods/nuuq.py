"""Codebooks of integers (NUUQ, Zacchigna et al., Electronics 13(10), 1923, 2024): any number of levels,
each a point of a uniform grid, so that products run on integer arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import packing, reference
from lowbit.formats import DIGIT_BASES, Format, as_format
from lowbit.methods import fitting, grid, kmeans, nearest
from lowbit.methods.errors import norms
from lowbit.methods.scales import count_tiny, store_scales
from lowbit.weights.quantized import QuantTensor


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    levels: int | None = None,
    table_bits: int = 8,
    iterations: int = 10,
) -> QuantTensor:
    """Fits a table of integers to `weight`, with a scale for each group, and chooses the codes.

    The paper (of which the abstract is public) separates the number of levels from the bits of the
    uniform grid that they lie on. The fit is our reading: k-means on the weights over their scales;
    the centers as integers q with |q| < 2^(table_bits - 1), for the step of the grid that loses
    least; the scales that are best for the codes, <w, q> / <q, q>; then the means of the weights of
    each code for the centers, and so on, as long as the error falls by 0.1 %.

    The format of the result is not that of the argument: its table is the integers, so that
    activations in int8 multiply them exactly ("int8" where the argument has "int8_table"), and
    codes of 3, 5 or 6 levels are packed as digits of bytes, in 1.6 or 2.67 bits.

    Args:
        weight: as in `kmeans.quantize`.
        format: a fitted format with scales and one table for the weight, as "kmeans2_g128" or
            "kmeans3_row_a8t"; "e8m0" scales are powers of two.
        levels: entries of the table, from 2 to the 2^bits of the format, which is the default.
        table_bits: of the grid, from 2 to 8; it has 2^table_bits - 1 integers, at least `levels`.
        iterations: at most so many, at least 1.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format is not as said, or an argument is out of
            range.
    """
    format = as_format(format)
    fitting.check_fitted(format, "nuuq")
    if format.scale is None or format.table_scope != "tensor":
        raise ValueError(
            f"method 'nuuq' fits one table and the scales of groups, format {format.name!r} has "
            f"scale {format.scale} and table_scope {format.table_scope!r}"
        )
    levels = 2**format.bits if levels is None else levels
    _check_numbers(levels, table_bits, iterations, format)
    grid.check_weight(weight, format)
    start = grid.start(weight, format)
    points, count = fitting.whole(start, weight, None).sorted_points()
    centers = kmeans.centers(points, count, levels)
    scales, sums = start, _Cells.of(points, nearest.nearest_codes(points, centers), count, levels)
    best, least = None, math.inf
    for _ in range(iterations):
        table, step = _integer_table(sums, 2 ** (table_bits - 1) - 1, format.scale == "e8m0")
        qt = grid.empty(weight, _integer_format(format, table))
        store_scales(qt, _effective(scales) * step, power="nearest")
        store_scales(qt, _best_scales(qt, weight), power="nearest")
        grid.fill_codes(qt, weight)
        error, _ = norms(weight, qt)
        # Scales that their dtype rounds up choose codes that teach no table.
        enough = error < least * (1 - 1e-3) and not count_tiny(qt)
        if error < least or best is None:
            best, least = qt, error
        if not enough:
            break
        scales, sums = qt, _cells(qt, weight, levels)
    assert best is not None
    return best


def _check_numbers(levels: int, table_bits: int, iterations: int, format: Format) -> None:
    if not 2 <= levels <= 2**format.bits:
        raise ValueError(
            f"levels must be from 2 to {2**format.bits} in format {format.name!r}, got {levels}"
        )
    if not 2 <= table_bits <= 8:
        raise ValueError(f"table_bits must be from 2 to 8, got {table_bits}")
    if 2**table_bits - 1 < levels:
        raise ValueError(
            f"table_bits must be enough for {levels} levels, {table_bits} give "
            f"{2**table_bits - 1} integers"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _integer_format(format: Format, table: tuple[float, ...]) -> Format:
    """`format` with the table as its own values, in the packing that takes least bytes."""
    levels, of_base = len(table), {base: name for name, base in DIGIT_BASES.items()}
    packing = of_base.get(levels, "bits")
    if format.bits != (levels - 1).bit_length():
        packing = "bits"
    return dataclasses.replace(
        format,
        name=f"nuuq{levels}_" + ("row" if format.group is None else f"g{format.group}"),
        table=table,
        packing=packing,
        activation="int8" if format.activation else None,
    )


class _Cells(NamedTuple):
    """Of the weights of each code, over their scales: what they count, scale^2, and their mean."""

    mass: Tensor  # (levels,) fp64
    mean: Tensor

    @classmethod
    def of(cls, points: Tensor, codes: Tensor, count: Tensor | None, levels: int) -> _Cells:
        counts = torch.ones_like(points, dtype=torch.float64) if count is None else count
        flat = codes.flatten().long()
        mass = torch.bincount(flat, counts.flatten(), levels)
        moment = torch.bincount(flat, (counts * points).flatten(), levels)
        return cls(mass, torch.where(mass > 0, moment / mass, 0.0))


def _cells(qt: QuantTensor, weight: Tensor, levels: int) -> _Cells:
    mass = moment = torch.zeros(levels, dtype=torch.float64, device="cpu")
    for rows, points, count in fitting.weight_points(qt, weight, None):
        codes = packing.unpack_codes(qt.tensors["codes"][rows], qt.format, qt.shape[1])
        part = _Cells.of(points, codes, count, levels)
        mass, moment = mass + part.mass.cpu(), moment + (part.mass * part.mean).cpu()
    return _Cells(mass, torch.where(mass > 0, moment / mass, 0.0))


def _integer_table(cells: _Cells, top: int, powers: bool) -> tuple[tuple[float, ...], float]:
    """The means as integers up to `top`, and their unit: a power of two, or as loses least."""
    mass, mean = cells
    absmax = mean.abs().max()
    if absmax == 0:
        return tuple(float(q - len(mean) // 2) for q in range(len(mean))), 0.0
    # One grid in a row: the largest mean is on it, or for powers of two near it.
    integers = torch.arange(1, top + 1, dtype=torch.float64, device=mean.device)
    unit = absmax / integers[:, None]
    if powers:
        unit = unit.log2().ceil().exp2()
    q = (mean / unit).round() + 0.0
    step = unit[:, 0] if powers else (mass * mean * q).sum(1) / (mass * q.square()).sum(1)
    loss = (mass * (mean - step[:, None] * q).square()).sum(1)
    best = int(loss.argmin())
    return tuple(q[best].tolist()), float(step[best])


def _effective(qt: QuantTensor) -> Tensor:  # (N, groups) fp64
    scales = reference.effective_scales(qt)
    assert scales is not None
    return scales.double()


def _best_scales(qt: QuantTensor, weight: Tensor) -> Tensor:  # (N, groups) fp64
    """<w, q> / <q, q> of every group for the codes that its stored scale chooses."""
    best, table = _effective(qt), grid.fixed_table(qt.format, qt.device)
    find = nearest.Nearest(table)
    for rows, w in grid.slices(weight):
        codes = find(grid.scaled(w, qt.format, best[rows].float()))
        parts = (grid.group_parts(t.double(), qt.format) for t in (w, table[codes.long()]))
        pairs = list(zip(*parts, strict=True))
        product = torch.cat([(w * q).sum(-1) for w, q in pairs], 1)
        square = torch.cat([(q * q).sum(-1) for _, q in pairs], 1)
        # A group of zeros, or of codes 0, keeps its scale.
        best[rows] = torch.where(product > 0, product / square, best[rows])
    return best
