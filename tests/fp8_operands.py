"""Operands of FP8 products for tests, and what a product may err."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fp8_values import E4M3, E5M2
from lowbit.fp8 import granularity as granularities
from lowbit.fp8 import reference
from lowbit.fp8.dtypes import E8M0
from lowbit.fp8.granularity import GRANULARITIES

TYPES = tuple(itertools.product((E4M3, E5M2), repeat=2))
PAIRINGS = tuple(itertools.product(GRANULARITIES, repeat=2))


def operand(rows: int, k: int, name: str, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Codes of normal values and scales that differ."""
    g = granularities.find(name)
    q = (torch.randn(rows, k) * 8).to(dtype)
    shape = g.scale_shape(rows, k)
    if g.scale_dtypes[0] == E8M0:
        return q, torch.randint(117, 138, shape, dtype=torch.uint8).view(E8M0)
    return q, torch.rand(shape) + 0.05


def assert_close(y: Tensor, a, b, scale_a, scale_b) -> None:
    """Products are exact, each of K sums and of the scalings rounds once to fp32; and the relative error is far below
    1e-3.
    """
    exact = reference.scaled_mm(a, b, scale_a, scale_b)
    wide = [reference.dequantize(t, s).double().abs() for t, s in ((a, scale_a), (b, scale_b))]
    bound = (a.shape[1] + 8) * 2**-24 * (wide[0] @ wide[1].T) + torch.finfo(torch.float32).tiny
    error = (y.double() - exact).abs()
    worst = int((error / bound).argmax())
    assert bool((error <= bound).all()), (worst, error.flatten()[worst], bound.flatten()[worst])
    assert error.norm() <= 1e-5 * exact.norm()
