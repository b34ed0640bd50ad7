"""Magnitude pruning, and k-means of what it leaves (Deep Compression, Han et al. 2016, arXiv 1510.00149)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.methods import fitting, grid, kmeans
from lowbit.weights.quantized import QuantTensor


def mask(weight: Tensor, *, density: float | None = None, quality: float | None = None) -> Tensor:
    """Which weights are kept: those of the largest magnitude; bool, the shape of `weight`.

    Args:
        weight: of any shape, finite.
        density: the share that is kept, in (0, 1], rounded to a whole number of weights, at least one. Of equal ones
            the first are kept.
        quality: or: what is below `quality` times the standard deviation goes (Han et al. 2015, arXiv 1506.02626).

    Raises:
        TypeError, ValueError: the weight is not floating, empty or not finite; not exactly one of the two is given, or
            it is out of range.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating tensor, got {got}")
    if not weight.numel() or not bool(weight.isfinite().all()):
        raise ValueError(f"weight must be finite and not empty, got shape {tuple(weight.shape)}")
    if (density is None) == (quality is None):
        raise ValueError(
            f"one of density and quality must be given, got density {density}, quality {quality}"
        )
    size = weight.detach().double().abs()
    if quality is not None:
        if not 0 <= quality < math.inf:
            raise ValueError(f"quality must be finite and at least 0, got {quality}")
        return size >= quality * weight.detach().double().std(correction=0)
    assert density is not None
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    count = max(1, round(density * weight.numel()))
    kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[size.flatten().argsort(descending=True, stable=True)[:count]] = True
    return kept.view(weight.shape)


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    density: float | None = None,
    quality: float | None = None,
    weights: Tensor | None = None,
) -> QuantTensor:
    """Prunes `weight`, and fits the table of a format to what is left; code 0 stands for 0.

    The other entries are those of k-means over the weights that are kept; each weight takes the nearest entry, also if
    that is 0.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty.
        format: a fitted format of 2 bits or more, or its name; one table without scales, as `Format.lut(bits=5,
            group=None, scale=None)`, is what `PrunedTensor.of` stores by its entries alone.
        density, quality: as in `mask`; without either the weights that are 0 already are those that go.
        weights: the importance of each weight, as in `kmeans.quantize`.

    Raises:
        TypeError, ValueError: as `kmeans.quantize` and `mask`; the format has 1 bit.
    """
    format = as_format(format)
    fitting.check_fitted(format, "prune")
    grid.check_weight(weight, format)
    if format.bits < 2:
        raise ValueError(f"format must have 2 bits or more, got {format.name!r}")
    weights = fitting.check_importance(weights, weight)
    kept = weight != 0
    if density is not None or quality is not None:
        kept = mask(weight, density=density, quality=quality)
    weight = torch.where(kept, weight, torch.zeros_like(weight))
    importance = kept.float() if weights is None else weights.expand(weight.shape) * kept
    qt = grid.start(weight, format)
    fitting.fit_tables(qt, weight, importance, _solve)
    grid.fill_codes(qt, weight)
    return qt


def _solve(problems: fitting.Problems, entries: int) -> Tensor:  # (R, entries) fp32 on the CPU
    """0, and the best other entries."""
    others = kmeans.centers(*problems.sorted_points(), entries - 1)
    return torch.cat((torch.zeros_like(others[:, :1]), others), 1)
