"""Operands of FP8 products for tests, and what a product may err."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fp8_values import E4M3, E5M2
from lowbit import float8
from lowbit.float8 import E8M0, GRANULARITIES
from lowbit.reference import fp8 as reference

TYPES = tuple(itertools.product((E4M3, E5M2), repeat=2))
PAIRINGS = tuple(itertools.product(GRANULARITIES, repeat=2))


def operand(rows: int, k: int, name: str, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Codes of normal values and scales that differ."""
    g = float8.find_granularity(name)
    q = (torch.randn(rows, k) * 8).to(dtype)
    shape = g.scale_shape(rows, k)
    if g.scale_dtypes[0] == E8M0:
        return q, torch.randint(117, 138, shape, dtype=torch.uint8).view(E8M0)
    return q, torch.rand(shape) + 0.05


def behind_nan(t: Tensor) -> Tensor:
    """t at the beginning of memory that goes on with NaN."""
    codes = t.view(torch.uint8) if t.dtype == E8M0 else t
    fill = 255 if t.dtype == E8M0 else torch.nan
    memory = torch.full((t.numel() + 64,), fill, dtype=codes.dtype)
    memory[: t.numel()] = codes.flatten()
    return memory[: t.numel()].view(t.shape).view(t.dtype)


def spoil(scale: Tensor, row: int, group: int) -> None:
    """One scale becomes NaN."""
    if scale.dtype == E8M0:
        scale.view(torch.uint8)[row, group] = 255
    else:
        scale[row, group] = torch.nan


def check_neighbours(run: Callable[..., Tensor], pairing: tuple[str, str], m: int, k: int) -> None:
    """No result depends on what lies behind the scales, and a scale that is NaN reaches its own rows alone."""
    n = 9
    a, scale_a = operand(m, k, pairing[0])
    b, scale_b = operand(n, k, pairing[1], E5M2)
    want = run(a, b, scale_a, scale_b)
    assert_close(want, a, b, scale_a, scale_b)
    assert torch.equal(run(a, b, behind_nan(scale_a), behind_nan(scale_b)), want)
    for which, scale in enumerate((scale_a, scale_b)):
        if pairing[which] in ("tensor", "128x128"):
            continue  # rows of a and of b share it
        for row, group in ((1, 0), (0, -1), (len(scale) - 1, 0)):
            scales = [scale_a.clone(), scale_b.clone()]
            spoil(scales[which], row, group)
            y = run(a, b, *scales)
            wrong = y.isnan() if which == 0 else y.isnan().t()
            assert bool(wrong[row].all())
            assert wrong.sum() == wrong[row].numel(), (pairing, m, k, which, row, group)


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
