"""Distributional quantization (Cholakov 2023): the entries of each block are the quantiles of a
distribution that is fitted to the block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowbit.codebooks.distributions import Array
from lowbit.codebooks.fitted import DISTRIBUTIONS, Moments, fitted_quantiles
from lowbit.formats import Format, as_format
from lowbit.methods import fitting, grid, lloyd
from lowbit.weights.quantized import QuantTensor

TAILS = ("absmax", "quantile")


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    distribution: str = "normal",
    tail: str = "quantile",
) -> QuantTensor:
    """Fits the tables of a format by quantiles, and chooses the nearest code of every weight.

    As far as the abstract of the paper says: weights in blocks, a Gaussian, Beta or Student-t
    distribution for each block, its quantiles as entries. Interpretation: the quantiles are those of
    (i + 1/2) / entries, and the distribution has the moments of the block, in which every weight
    counts alike (`codebooks.fitted`). They are not the table of least squared error, above all
    because the outer entries lie inside the weights; with `tail` "absmax", which is not in the
    paper, the entries on either side of the mean are stretched until the outermost are the smallest
    and the largest weight of the block.

    Args:
        weight, format: as in `kmeans.quantize`. The paper's format is `Format.lut(bits=4, group=64,
            scale=None, table_scope="group")`.
        distribution: "normal", "student_t" or "beta".
        tail: "quantile" or "absmax".

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format is not fitted, or an argument is
            unknown.
        ImportError: scipy is missing.
    """
    format = as_format(format)
    fitting.check_fitted(format, "distq")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {TAILS}, got {tail!r}")
    grid.check_weight(weight, format)

    def solve(problems: fitting.Problems, entries: int) -> Tensor:
        moments, low, high = _moments(problems)
        table = fitted_quantiles(distribution, moments, lloyd.middles(entries).numpy())
        if tail == "absmax":
            table = _stretched(table, moments.mean, low, high)
        return torch.from_numpy(table)

    qt = grid.start(weight, format)
    fitting.fit_tables(qt, weight, None, solve)
    grid.fill_codes(qt, weight)
    return qt


def _moments(problems: fitting.Problems) -> tuple[Moments, Array, Array]:
    """The moments, and the smallest and the largest point, (R, 1) each."""
    size = problems.size
    parts = [
        (p.sum(1, keepdim=True, dtype=torch.float64), *p.aminmax(dim=1, keepdim=True))
        for p, _ in problems.parts()
    ]
    total, lows, highs = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    low, high = lows.amin(1, keepdim=True), highs.amax(1, keepdim=True)
    mean = (total.sum(1, keepdim=True) / size).maximum(low).minimum(high)
    square = fourth = torch.zeros_like(mean)
    for points, _ in problems.parts():
        distance = (points.double() - mean).square()
        square = square + distance.sum(1, keepdim=True)
        fourth = fourth + distance.square().sum(1, keepdim=True)
    variance = square / size
    kurtosis = torch.where(variance > 0, fourth / size / variance.square() - 3, 0.0)
    absmax = torch.maximum(-low, high).double()
    arrays = (t.double().cpu().numpy() for t in (mean, variance, kurtosis, absmax, low, high))
    mean_, variance_, kurtosis_, absmax_, low_, high_ = arrays
    return Moments(mean_, variance_, kurtosis_, absmax_), low_, high_


def _stretched(table: Array, mean: Array, low: Array, high: Array) -> Array:
    below, above = mean - table[:, :1], table[:, -1:] - mean
    left = np.divide(mean - low, below, out=np.ones_like(mean), where=below > 0)
    right = np.divide(high - mean, above, out=np.ones_like(mean), where=above > 0)
    stretched = mean + (table - mean) * np.where(table < mean, left, right)
    # Exactly, and even where a skewed distribution has all its quantiles on one side of the mean.
    stretched[:, :1], stretched[:, -1:] = low, high
    return stretched
