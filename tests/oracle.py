"""What tests of quantizers share: a weight, and the check that no other code would be nearer to it."""

from __future__ import annotations

import math

import torch

from lowbit import reference
from lowbit.methods import quantize
from lowbit.weights.quantized import QuantTensor


def normal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """A weight of independent normal values."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def error_of(
    qt: QuantTensor, weight: torch.Tensor, importance: torch.Tensor | float = 1.0
) -> float:
    """The weighted squared error, in float64."""
    return float(((qt.dequantize().double() - weight.double()).square() * importance).sum())


SEARCHED_KINDS = ("normal", "heavy", "sparse", "rows")


def assert_search_descends(
    name: str, kind: str, weighted: bool, iterations: tuple[int, ...]
) -> None:
    """More iterations of the search never leave a larger error, and k-means with absmax scales a larger one yet; codes
    are best. Weights are of one of SEARCHED_KINDS.
    """
    weight = normal(24, 200)
    if kind == "heavy":
        weight = weight**3
    elif kind == "sparse":
        weight[normal(24, 200, seed=1) > 0] = 0
    elif kind == "rows":
        weight *= torch.logspace(-3, 3, 24)[:, None]
    importance = torch.rand(200, generator=torch.Generator().manual_seed(2)) if weighted else None
    counts = 1.0 if importance is None else importance.double()
    last = error_of(quantize(weight, name, "kmeans", weights=importance), weight, counts)
    if kind == "normal":
        last *= 0.9
    for count in iterations:
        qt = quantize(weight, name, weights=importance, iterations=count).validate()
        error = error_of(qt, weight, counts)
        # Codes are chosen from a quotient that is rounded to fp32.
        assert error <= last * (1 + 1e-6)
        last = error
    assert_codes_are_best(qt, weight)


def candidates(qt: QuantTensor) -> torch.Tensor:
    """What each weight would be with each code, (codes, N, K) fp64; NaN and inf codes count as
    inf.
    """
    n, k = qt.shape
    every, chosen = [], reference.chosen_tables(qt.scales, qt.format)
    for code in range(qt.format.num_codes):
        codes = torch.full((n, k), code, dtype=torch.uint8)
        values = reference.code_values(codes, qt.format, qt.table, chosen)
        scales = reference.effective_scales(qt)
        every.append(
            reference.apply_scales(
                values, qt.format, scales, reference.effective_zeros(qt)
            ).double()
        )
    return torch.stack(every).nan_to_num(nan=math.inf)


def assert_codes_are_best(qt: QuantTensor, weight: torch.Tensor) -> None:
    w = weight.float().double()
    chosen = (qt.dequantize().double() - w).abs()
    best = (candidates(qt) - w).abs().amin(0)
    # The code is chosen from w / scale (after w - zero for zero "min", and before + zero for
    # "float"), each rounded to fp32; this moves the boundary between two codes by at most 2^-24 of
    # every term, and the error by twice that.
    terms = w.abs()
    if qt.zeros is not None:
        group = reference.group_index(qt.format, qt.shape[1], w.device)
        zero = reference.effective_zeros(qt).double()[:, group]
        scale = reference.effective_scales(qt).double()[:, group]
        terms = terms + (zero if qt.format.zero == "min" else zero * scale).abs()
    assert (chosen <= best + 2**-22 * terms).all()
