"""Scales by search: the scale of every group, of either sign, with the least squared error, in turn with the table.

A signed scale lets one table of the whole weight be asymmetric: the largest weight of every group is then at the same
end of it. For a given table the scales of all groups are independent: candidates around the largest weight are tried,
refitted by least squares to their codes, and rounded to the integers of the format (csrc/cpu/offline/scale_search.h).
For given scales the table is that of `kmeans`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit import reference
from lowbit.backends.cpu.scale_search import search_scales
from lowbit.formats import INTEGER_SCALES, Format, as_format
from lowbit.methods import fitting, grid, kmeans, scales
from lowbit.weights.quantized import QuantTensor

# Candidates of a scale over the largest weight of its group, for a table fitted to scales of ratio 1.
RATIOS = tuple(0.7 + 0.05 * i for i in range(10))


def fits(format: Format) -> bool:
    """Whether "search" takes the format: a table fitted to the weight, scales that are integers of either sign."""
    return (
        format.fitted
        and format.table_scope == "tensor"
        and format.integer_scales
        and INTEGER_SCALES[format.scale or ""][0] < 0
    )


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    weights: Tensor | None = None,
    iterations: int = 6,
) -> QuantTensor:
    """Fits table and scales of a format to `weight` and chooses the nearest code of every weight.

    The sum of importance * (W - W^)^2 never rises from one iteration to the next, and is never above that of
    `kmeans` with the same format.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32.
        format: a format with a table of the weight and signed integer scales, or its name: "km4", "km3_g16",
            "kmeans4_g64_int8".
        weights: the importance of each weight, (N, K) or (K,), finite and not negative; where all are 0 each counts
            1. A weight of importance 0 has no part in the fit.
        iterations: how often table and scales are fitted, 1 or more; fewer if nothing changes any more.

    Raises:
        TypeError, ValueError: as `kmeans.quantize`; the format has other tables or scales.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 256), "km4", weights=second_moment)
    """
    format = as_format(format)
    if not fits(format):
        raise ValueError(
            f"method 'search' needs a table fitted to the whole weight and scales 'int8' or 'int6', "
            f"format {format.name!r} has others"
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
    best = kmeans.quantize(counted, format, weights=weights)
    least = _search(best, counted, weights, ())
    qt = _start(counted, format)
    previous = float("inf")
    for _ in range(iterations):
        fitting.fit_tables(qt, counted, weights, kmeans.solve)
        error = _search(qt, counted, weights, RATIOS)
        if error < least:
            least, best = error, qt.map(torch.clone)
        if not error < previous:
            break
        previous = error
    grid.fill_codes(best, weight)
    return best


def _start(weight: Tensor, format: Format) -> QuantTensor:
    """Scales that divide the largest weight of every group to 1, with room above them."""
    low = grid.reduce(weight, format, lambda g: g.amin(-1).double())
    high = grid.reduce(weight, format, lambda g: g.amax(-1).double())
    largest = torch.where(-low > high, low, high)
    qt = grid.empty(weight, format)
    scales.store_scales(qt, largest.abs() * RATIOS[-1])
    _set_scales(qt, slice(None), largest.float(), _steps(qt))
    return qt


def _search(
    qt: QuantTensor, weight: Tensor, weights: Tensor | None, ratios: tuple[float, ...]
) -> float:
    """Replaces the scales of `qt` by better ones for its table, and returns the error that is left."""
    steps, at_hand = _steps(qt), reference.effective_scales(qt)
    table = qt.tensors["table"].cpu().sort().values
    both = torch.tensor([*ratios, *(-r for r in ratios)], dtype=torch.float32, device="cpu")
    group = qt.format.group or weight.shape[1]
    top = INTEGER_SCALES[qt.format.scale or ""][1]
    assert at_hand is not None
    every = []
    for rows, w, importance in _slices(weight, weights):
        mine = steps[rows].cpu()
        found, errors = search_scales(
            w, importance, group, at_hand[rows].cpu(), mine, top, table, both
        )
        _set_scales(qt, rows, found, mine)
        every.append(errors)
    return float(torch.cat(every).sum())


def _slices(
    weight: Tensor, weights: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:  # (R, K) fp32 on the CPU
    for rows, w in grid.slices(weight):
        importance = None if weights is None else weights[rows].float().contiguous().cpu()
        yield rows, w.contiguous().cpu(), importance


def _steps(qt: QuantTensor) -> Tensor:  # (N, groups) fp32
    """What a scale of 1 stands for."""
    codes = qt.tensors["scales"]
    return reference.of_two_levels(torch.ones_like(codes), qt.tensors["scales2"], qt.format)


def _set_scales(qt: QuantTensor, rows: slice, values: Tensor, steps: Tensor) -> None:
    top = INTEGER_SCALES[qt.format.scale or ""][1]
    codes = torch.where(steps != 0, values / steps, 0.0).round().clamp(-top, top)
    codes = torch.where((codes == 0) & (steps != 0), values.sign(), codes)
    qt.tensors["scales"][rows] = codes.to(torch.int8)
