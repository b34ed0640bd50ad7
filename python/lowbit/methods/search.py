"""Scales by search: the scale of every group, of either sign, with the least squared error, in turn with the table.

A signed scale lets one table of the whole weight be asymmetric: the largest weight of every group is then at the same
end of it. For a given table the scales of all groups are independent: candidates around the largest weight are tried,
refitted by least squares to their codes, and rounded as the format stores them (csrc/cpu/offline/scale_search.h); of
a pair of tables every group takes the better one. For given scales a fitted table is that of `kmeans`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit import reference
from lowbit.backends.cpu.scale_search import search_scales
from lowbit.formats import INTEGER_SCALES, SECOND_LEVELS, Format, as_format
from lowbit.methods import fitting, grid, kmeans, rtn, scales
from lowbit.strides import contiguous
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor

# Candidates of a scale over that which takes the largest weight of its group to the largest value: for tables that are
# fitted to such scales, and for others.
FITTED_RATIOS = tuple(0.75 + 0.05 * i for i in range(13))
FIXED_RATIOS = tuple(0.3 + 0.05 * i for i in range(20))
# Tables are fitted to about so many weights at most, of rows that lie evenly.
FITTED_WEIGHTS = 1 << 18
# Bins that the points of a table are averaged in: hundreds of them lie between two of its entries.
FITTED_POINTS = 1 << 13
# How far the second of a pair of tables begins from the first, in steps between its entries.
PAIR_SHIFT = 0.25


def by_default(format: Format) -> bool:
    """Whether "search" is the method of a format where none is asked for: the scales of a fitted table are integers
    of either sign.
    """
    return format.fitted and format.integer_scales and _takes(format)


def _takes(format: Format) -> bool:
    signed = format.integer_scales and INTEGER_SCALES[format.scale or ""][0] < 0
    return (
        format.codec in ("affine", "lut")
        and format.zero is None
        and format.table_scope in ("tensor", "pair")
        and (signed or format.scale in SECOND_LEVELS)
    )


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    weights: Tensor | None = None,
    iterations: int = 6,
) -> QuantTensor:
    """Searches the scales of a format for `weight`, fits its table if it has none, and chooses the nearest code of
    every weight.

    The sum of importance * (W - W^)^2 never rises from one iteration to the next, and is never above that of
    `kmeans` with tables of as many bins, or of `rtn` for a format with values of its own. Tables of large weights are
    fitted to some of the rows, and once more to all of them when the scales are there.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32.
        format: a format, or its name, of integers without a zero or of one table or a pair, with scales in fp32, fp16,
            bf16 or signed integers: "km4", "km4x2", "kmeans3_g32", "nf4", "q4_0", "iq4_nl", "q6_k".
        weights: the importance of each weight, (N, K) or (K,), finite and not negative; where all are 0 each counts
            1. A weight of importance 0 has no part in the fit.
        iterations: how often scales, and a fitted table, are improved, 1 or more; fewer if nothing changes any more.

    Raises:
        TypeError, ValueError: as `rtn.quantize` and `kmeans.quantize`; the format has a zero, other tables or other
            scales.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 256), "nf4", "search", weights=second_moment)
    """
    format = as_format(format)
    if not _takes(format):
        raise ValueError(
            "method 'search' needs integers without a zero or one table or a pair, and scales in fp32, fp16, bf16 or "
            f"signed integers, format {format.name!r} has others"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
    grid.check_weight(weight, format)
    weights = fitting.check_importance(weights, weight)
    counted = weight
    if weights is not None:
        if bool(weights.any()):
            counted = torch.where(weights > 0, weight, 0.0)
        else:
            weights = None
    if format.fitted:
        qt = _fit(counted, format, weights, iterations)
    else:
        qt = rtn.quantize(counted, format)
        _improve(qt, counted, weights, iterations)
    grid.fill_codes(qt, weight)
    return qt


def _improve(qt: QuantTensor, weight: Tensor, weights: Tensor | None, iterations: int) -> None:
    """Improves the scales of a format with values of its own."""
    error = _search(qt, weight, weights, FIXED_RATIOS)
    for _ in range(iterations - 1):
        previous, error = error, _search(qt, weight, weights, ())
        if not error < previous:
            break


def _fit(weight: Tensor, format: Format, weights: Tensor | None, iterations: int) -> QuantTensor:
    best = grid.start(weight, format)
    fitting.fit_tables(best, weight, weights, _solve)
    least = _search(best, weight, weights, ())
    stride = math.ceil(weight.numel() / FITTED_WEIGHTS)
    if stride == 1 or len(weight) < 2 * stride:
        qt, error = _alternate(weight, format, weights, iterations)
        return qt if error < least else best
    # Tables hardly depend on which of so many weights they are fitted to: only the scales take all of them.
    some = None if weights is None else weights[::stride]
    if some is not None and not bool(some.any()):
        some = None
    part, _ = _alternate(weight[::stride], format, some, iterations)
    qt = _start(weight, format)
    qt.tensors["table"].copy_(part.tensors["table"])
    error = _search(qt, weight, weights, FITTED_RATIOS)
    found = qt.map(torch.clone)
    fitting.fit_tables(qt, weight, weights, _solve)
    refined = _search(qt, weight, weights, ())
    if refined < error:
        found, error = qt, refined
    return found if error < least else best


def _alternate(
    weight: Tensor, format: Format, weights: Tensor | None, iterations: int
) -> tuple[QuantTensor, float]:
    """Scales and tables in turn, and the error that they leave."""
    qt = _start(weight, format)
    least, best, previous = math.inf, qt, math.inf
    for i in range(iterations):
        fitting.fit_tables(qt, weight, weights, _solve)
        if i == 0 and format.table_scope == "pair":
            _part(qt.tensors["table"])
        error = _search(qt, weight, weights, FITTED_RATIOS)
        if error < least:
            least, best = error, qt.map(torch.clone)
        if not error < previous:
            break
        previous = error
    return best, least


def _solve(problems: fitting.Problems, entries: int) -> Tensor:  # (R, entries) fp32
    return kmeans.centers(*problems.sorted_points(FITTED_POINTS), entries)


def _part(tables: Tensor) -> None:
    """Moves the second of two equal tables (2, E) away from the first."""
    entries = tables.shape[1]
    tables[1] += PAIR_SHIFT * (tables[0].max() - tables[0].min()) / (entries - 1)


def _start(weight: Tensor, format: Format) -> QuantTensor:
    """Scales that divide the largest weight of every group to 1, with room above them for other integers."""
    low = grid.reduce(weight, format, lambda g: g.amin(-1).double())
    high = grid.reduce(weight, format, lambda g: g.amax(-1).double())
    largest = torch.where(-low > high, low, high)
    qt = grid.empty(weight, format)
    room = FITTED_RATIOS[-1] if format.integer_scales else 1.0
    scales.store_scales(qt, largest.abs() * room)
    if format.integer_scales:
        _set_scales(qt, slice(None), largest.float(), _steps(qt))
    else:
        qt.tensors["scales"].mul_(largest.sign())
    return qt


def _search(
    qt: QuantTensor, weight: Tensor, weights: Tensor | None, ratios: tuple[float, ...]
) -> float:
    """Replaces the scales of `qt` by better ones for its table, and returns the error that is left."""
    steps, at_hand = _steps(qt), reference.effective_scales(qt)
    assert at_hand is not None
    chosen = reference.chosen_tables(qt.tensors["scales"], qt.format)
    table = qt.tensors["table"] if qt.format.fitted else grid.fixed_table(qt.format, qt.device)
    table = table.cpu().sort(-1).values
    unit = 1.0 if qt.format.fitted else float(table.abs().max())
    both = [sign * ratio / unit for sign in (1, -1) for ratio in ratios]
    candidates = torch.tensor(both, dtype=torch.float32, device="cpu")
    kinds = _top(qt.format), _floats(qt.format)
    group = qt.format.group or weight.shape[1]
    every = []
    for rows, w, importance in _slices(weight, weights):
        mine = None if steps is None else steps[rows].cpu()
        numbers = None if chosen is None else chosen[rows].to(torch.uint8).cpu()
        found, errors, numbers = search_scales(
            w, importance, group, at_hand[rows].cpu(), mine, *kinds, table, candidates, numbers
        )
        _set_scales(qt, rows, found, mine, numbers)
        every.append(errors)
    return float(torch.cat(every).sum())


def _slices(
    weight: Tensor, weights: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:  # (R, K) fp32 on the CPU
    for rows, w in grid.slices(weight):
        importance = None if weights is None else contiguous(weights[rows].float()).cpu()
        yield rows, contiguous(w).cpu(), importance


def _steps(qt: QuantTensor) -> Tensor | None:  # (N, groups) fp32
    """What an integer scale of 1 stands for."""
    if not qt.format.integer_scales:
        return None
    ones = torch.ones_like(qt.tensors["scales"])
    return reference.of_two_levels(ones, qt.tensors["scales2"], qt.format)


def _top(format: Format) -> int:
    return INTEGER_SCALES.get(format.scale or "", (0, 0))[1]


def _floats(format: Format) -> tuple[int, int, float]:
    """Of the dtype of float scales: binary digits, the exponent of the least one, and the largest one."""
    info = torch.finfo(torch.float32 if format.integer_scales else SCALE_DTYPES[format.scale or ""])
    digits = 1 - round(math.log2(info.eps))
    return digits, round(math.log2(info.smallest_normal)) + 1 - digits, info.max


def _set_scales(
    qt: QuantTensor, rows: slice, values: Tensor, steps: Tensor | None, chosen: Tensor | int = 0
) -> None:
    if steps is not None:
        top = _top(qt.format)
        values = torch.where(steps != 0, values / steps, 0.0).round().clamp(-top, top)
        values = scales.stored_integers(values, qt.format, chosen)
    qt.tensors["scales"][rows] = values.to(qt.tensors["scales"])
