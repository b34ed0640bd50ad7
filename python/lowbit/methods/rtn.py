"""Round to nearest: scales fitted per group, then the nearest code of every weight. Plain torch,
any device.

Scales are rounded to their stored dtype first and codes are chosen against what is stored, so a
code is always the best one for the scale that is applied to it. The fit is done in float64 on one
value per group, the codes in fp32; rows are processed in slices, so temporaries stay below about
20 MiB whatever the weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit import ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import Format, as_format
from lowbit.methods import clipping as clip
from lowbit.methods import grid
from lowbit.methods.nearest import Nearest
from lowbit.methods.scales import SYMMETRIC_RANGES, store
from lowbit.weights.quantized import QuantTensor

CLIPPINGS = ("minmax", "percentile", "mse", "kl")
ROUNDINGS = ("nearest", "stochastic", "floor")


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    table: Tensor | None = None,
    granularity: str = "group",
    symmetric_range: str = "balanced",
    clipping: str = "minmax",
    percentile: float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> QuantTensor:
    """Rounds every weight to the nearest value of its group.

    The scale of a group is, by `format.scale_rule`: "absmax": absmax / (2^(bits - 1) - 0.5) for
    integers (the full range, as GPTQ) and absmax / max|value| for tables and fp8, where a fitted
    table counts as one in [-1, 1]; "rms" and "mean": that statistic of |w|; "minmax": (max - min) /
    (2^bits - 1), where the range of zero "int" and "float" includes 0. With zeros and a rule other
    than "minmax" the grid is centred on 0. A scale that would round to 0 becomes the smallest
    positive one; a group of zeros has scale 0 where the dtype has a 0. "e8m0" scales follow OCP MX,
    2^(floor(log2 absmax) - floor(log2 max|value|)) (2^(bits - 1) - 1 for integers), round up for
    "minmax" and to the nearest power of two otherwise. "mean" on "binary" is BWN of XNOR-Net (arXiv
    1603.05279), alpha = mean|w|.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32.
        format: any Format or its name; a fitted one needs `table`.
        table: values of the codes of a fitted format, in the shape that `tensor_specs` gives.
        granularity: "group", as the format says, or "tensor": the whole weight is one group, and
            its scale and zero are stored in every group.
        symmetric_range: what absmax is divided by for integers without a zero. "balanced": 2^(bits -
            1) - 0.5, the full range of Gholami et al. (arXiv 2103.13630); "full": 2^(bits - 1), as
            FasterTransformer, where absmax saturates; "restricted": 2^(bits - 1) - 1, with codes
            as far below 0 as above.
        clipping: which part of absmax or of (min, max) takes the place of all of it. "minmax": all.
            "percentile": that quantile of |w|, or (1 - percentile, percentile) of w. "mse": the
            fraction 1, 0.99, ..., 0.11 with the least squared error of the group rounded to nearest
            (OMSE as in FQ-ViT, arXiv 2111.13824; scales of two levels count as fp32 in it). "kl":
            the threshold of |w| with the least entropy lost (`clipping.entropy_threshold`), for
            integers whose groups are rows or the tensor.
        percentile: above 0.5 and at most 1; by default 0.99999.
        rounding: of integers, w / scale to the "nearest" (ties to even), to the next below
            ("floor") or "stochastic": up with the probability of the fraction.
        seed: of stochastic rounding.

    Temporaries are small but for "percentile" of a tensor, which copies the weight.

    Raises:
        TypeError: weight is not a floating tensor, or table no tensor.
        ValueError: weight is not a matrix, is empty, holds NaN, inf or a value above 2^126, or
            needs a scale beyond the format's dtype; `table` is missing, not wanted, of the wrong
            shape or not finite; the scale rule does not fit the codec; an option is unknown, out of
            range or does not fit the format.
    """
    format = as_format(format)
    grid.check_weight(weight, format)
    if format.fitted and table is None:
        raise ValueError(
            f"format {format.name!r} has no table of its own: use method='kmeans' or pass table"
        )
    per_tensor = grid.check_granularity(granularity, format)
    _check_options(format, symmetric_range, clipping, percentile, rounding)
    if clipping == "kl" and not per_tensor and format.num_groups(weight.shape[1]) > 1:
        raise ValueError(
            f"clipping 'kl' needs a histogram of a row or of the weight, format {format.name!r} has "
            f"groups of {format.group}: use granularity='tensor' or a format by row"
        )
    restricted = 2 ** (format.bits - 1) - 1 if symmetric_range == "restricted" else None
    qt = grid.empty(weight, format)
    if table is not None:
        grid.set_table(qt, table)
    if format.scale is not None:
        if clipping == "percentile":
            fraction = clip.PERCENTILE if percentile is None else percentile
            low, high = _percentiles(weight, format, per_tensor, fraction)
        else:
            low, high = grid.ranges(weight, format, per_tensor)
        if clipping == "kl":
            top = _thresholds(weight, torch.maximum(-low, high), 2 ** (format.bits - 1), per_tensor)
            low, high = low.maximum(-top), high.minimum(top)
        elif clipping == "mse":
            nearest = _rounder("nearest", restricted)

            def error(low: Tensor, high: Tensor) -> Tensor:
                errors = _squared_errors(weight, format, low, high, symmetric_range, nearest)
                return errors.sum().expand_as(errors) if per_tensor else errors

            low, high = clip.least_error(low, high, error)
        store(qt, low, high, symmetric_range)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    grid.fill_codes(qt, weight, _rounder(rounding, restricted, generator))
    return qt


def _check_options(
    format: Format, symmetric_range: str, clipping: str, percentile: float | None, rounding: str
) -> None:
    grid.one_of("symmetric_range", symmetric_range, SYMMETRIC_RANGES)
    grid.one_of("clipping", clipping, CLIPPINGS)
    grid.one_of("rounding", rounding, ROUNDINGS)
    affine, name = format.codec == "affine", f"format {format.name!r}"
    symmetric = affine and format.zero is None and format.scale_rule == "absmax"
    if symmetric_range != "balanced" and not symmetric:
        raise ValueError(
            f"symmetric_range {symmetric_range!r} is for integers without a zero and scales by "
            f"absmax, {name} is none"
        )
    if rounding != "nearest" and not affine:
        raise ValueError(f"rounding {rounding!r} is for integers, {name} has a table")
    if clipping != "minmax" and format.scale_rule not in ("absmax", "minmax"):
        raise ValueError(
            f"clipping {clipping!r} is for scales by absmax or minmax, {name} has "
            f"{format.scale_rule!r}"
        )
    if clipping != "minmax" and (format.scale is None or format.fitted):
        raise ValueError(
            f"clipping {clipping!r} needs scales and values that are not fitted, {name} has "
            f"{'none' if format.scale is None else 'a fitted table'}"
        )
    if clipping == "kl" and not affine:
        raise ValueError(f"clipping 'kl' is for integers, {name} has a table")
    if percentile is not None:
        if clipping != "percentile":
            raise ValueError(f"percentile is for clipping 'percentile', got {clipping!r}")
        clip.check_percentile(percentile)


def _rounder(
    rounding: str, top: int | None, generator: torch.Generator | None = None
) -> grid.Round:
    """Rounds scaled weights to integers, of magnitude `top` at most."""

    def stochastic(ratio: Tensor) -> Tensor:
        below = ratio.floor()
        noise = torch.rand(
            ratio.shape, generator=generator, dtype=torch.float32, device=ratio.device
        )
        return below + (noise < ratio - below)

    rounders: dict[str, grid.Round] = {
        "nearest": torch.round,
        "floor": torch.floor,
        "stochastic": stochastic,
    }
    rounds = rounders[rounding]
    return rounds if top is None else lambda ratio: rounds(ratio).clamp(-top, top)


def _percentiles(
    weight: Tensor, format: Format, per_tensor: bool, fraction: float
) -> tuple[Tensor, Tensor]:  # (N, groups) fp64 each
    shape = weight.shape[0], format.num_groups(weight.shape[1])
    if per_tensor:
        weight, format = weight.reshape(1, -1), dataclasses.replace(format, group=None)
    if format.scale_rule == "minmax":
        low = grid.reduce(weight, format, lambda g: clip.quantile(g, 1 - fraction))
        high = grid.reduce(weight, format, lambda g: clip.quantile(g, fraction))
    else:
        high = grid.reduce(weight, format, lambda g: clip.quantile(g.abs(), fraction))
        low = -high
    return low.expand(shape), high.expand(shape)


def _thresholds(weight: Tensor, absmax: Tensor, levels: int, per_tensor: bool) -> Tensor:
    """The entropy threshold of |w| of every row, or of the weight; (N, 1) fp64, as `absmax`."""
    tops = absmax[:1, 0] if per_tensor else absmax[:, 0]
    counts = torch.zeros(len(tops), clip.BINS, dtype=torch.float64, device=weight.device)
    for rows, w in grid.slices(weight):
        top = tops if per_tensor else tops[rows]
        width = torch.where(top > 0, top, 1.0)[:, None] / clip.BINS
        index = (w.abs() / width).long().clamp(max=clip.BINS - 1)
        index = index.view(1, -1) if per_tensor else index
        ones = torch.ones((), dtype=torch.float64, device=w.device).expand(index.shape)
        counts[slice(0, 1) if per_tensor else rows].scatter_add_(1, index, ones)
    kept = [clip.entropy_threshold(row, levels) for row in counts]
    return (tops * tops.new_tensor(kept) / clip.BINS).view(-1, 1).expand_as(absmax)


def _squared_errors(
    weight: Tensor,
    format: Format,
    low: Tensor,
    high: Tensor,
    symmetric_range: str,
    round: grid.Round,
) -> Tensor:
    """sum (w - w^)^2 of every group if its range is low .. high, all (N, groups) fp64."""
    two_levels = format.scale in ("e4m3", "dq8") or format.integer_scales
    single = "fp32" if two_levels else format.scale
    by_row = dataclasses.replace(format, group=None, scale=single, scale2=None, scale2_group=None)
    table = grid.fixed_table(format, weight.device)
    nearest = Nearest(table) if format.codec == "lut" else table
    out = torch.empty_like(low)
    for rows, w in grid.slices(weight):
        first = 0
        for part in grid.group_parts(w, format):
            at = rows, slice(first, first + part.shape[1])
            first = at[1].stop
            flat = part.flatten(0, 1)
            qt = grid.empty(flat, by_row)
            store(qt, low[at].reshape(-1, 1), high[at].reshape(-1, 1), symmetric_range)
            scale = reference.effective_scales(qt)
            zero = reference.effective_zeros(qt)
            ratio = grid.scaled(flat, by_row, scale, zero if format.zero == "min" else None)
            codes = grid.find_codes(ratio, by_row, zero, nearest, round)
            made = reference.apply_scales(table[codes.long()], by_row, scale, zero)
            errors = (flat - made).square().sum(1, dtype=torch.float64)
            out[at] = errors.view(part.shape[:2])
    return out
