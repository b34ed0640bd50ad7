"""Grids that are not uniform: their tables, the papers' rules for codes, and the same codes from integers."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.integer.coded import (
    GELU_LEAST,
    Coded,
    log2,
    log_sqrt2,
    shifted,
    twin_gelu,
    twin_softmax,
)
from lowbit.integer.functions import SOFTMAX_BITS, log_round
from lowbit.integer.rescaling import Grid

PROBABILITIES = torch.arange(1, 2**SOFTMAX_BITS + 1)
GRIDS = [
    *(make(bits, 18) for make in (log2, log_sqrt2) for bits in (4, 6, 8)),
    *(twin_softmax(bits, split) for bits in (4, 8) for split in (0, 2, 5)),
    *(twin_gelu(bits, step) for bits in (4, 8) for step in (0.002, 0.03, 0.5)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.table.numel()}-{g.bound}")
def test_codes(grid: Coded) -> None:
    """Every used code is that of its own value; values ascend; codes fit the bits; integers give what reals do."""
    values = grid.dequantize(grid.used)
    assert (values.diff() >= 0).all()
    assert grid.table.numel() <= 2**grid.bits
    assert int(grid.used.max()) < 2**grid.bits
    assert torch.equal(grid.dequantize(grid.quantize(values)), values)
    assert float(grid.dequantize(grid.quantize(torch.tensor([0.0])))[0]) == 0
    p = PROBABILITIES
    from_real = grid.quantize(p.double() / 2**SOFTMAX_BITS)
    assert torch.equal(grid.encode(p, SOFTMAX_BITS), from_real.long())


def test_log2_is_the_papers() -> None:
    """Code q is 2^-q with log_round's threshold at 1.5, for ratios that are powers of two and for all others."""
    grid = log2(4, 18)
    p = PROBABILITIES.double() / 2**SOFTMAX_BITS
    code = grid.quantize(p).long()
    assert torch.equal(grid.dequantize(torch.arange(15)), torch.exp2(-torch.arange(15).double()))
    # Rounding p up from 1.5 * 2^-q is rounding 2^15 p so.
    want = (SOFTMAX_BITS - log_round(PROBABILITIES)).clamp(max=15)
    want[p < 0.75 * 2.0**-14] = 15
    assert torch.equal(code, want)


def test_log_sqrt2_is_the_papers() -> None:
    """q = round(-2 log2 p), 2^-ceil(q / 2) times sqrt(2) for odd q, as integers of 18 bits."""
    grid = log_sqrt2(4, 18)
    p = PROBABILITIES.double() / 2**SOFTMAX_BITS
    q = (-2 * torch.log2(p)).round()
    near_tie = ((-2 * torch.log2(p)) % 1 - 0.5).abs() < 1e-9
    want = q.clamp(max=15).long()
    assert torch.equal(grid.quantize(p)[~near_tie].long(), want[~near_tie])
    codes = torch.arange(15)
    paper = torch.exp2(-torch.ceil(codes / 2).double()) * (1 + (codes % 2) * (math.sqrt(2) - 1))
    assert (grid.dequantize(codes) - paper).abs().max() <= 2.0**-19
    assert float(grid.dequantize(torch.tensor(15))) == 0


def test_errors_of_attention_maps_at_4_bits() -> None:
    """Squared errors of a softmax's results: sqrt(2) below 2, and twin steps below one."""
    torch.manual_seed(0)
    p = torch.softmax(3 * torch.randn(200, 64, dtype=torch.float64), -1)

    def error(grid: Grid) -> float:
        return float((grid.dequantize(grid.quantize(p)) - p).square().mean())

    twin = min(error(twin_softmax(4, split)) for split in range(8))
    assert error(log_sqrt2(4, 15)) < error(log2(4, 15))
    assert twin < error(twin_softmax(4, 0))


def test_twin_steps() -> None:
    """Large steps are a power of two of the small ones; GELU's least value is in the range."""
    grid = twin_softmax(8, 3)
    assert grid.dequantize(torch.tensor([127, 255])).tolist() == pytest.approx([1 / 8, 1])
    for bits in (4, 8):
        for step in (0.001, 0.02, 0.3):
            gelu = twin_gelu(bits, step)
            half = 1 << (bits - 1)
            assert float(gelu.dequantize(torch.tensor(half - 1))) == pytest.approx(
                step * (half - 1)
            )
            least = float(gelu.dequantize(torch.tensor(2 * half - 1)))
            assert least <= GELU_LEAST or step < -GELU_LEAST / (half - 1)
            assert least >= 2 * GELU_LEAST


def test_factors_of_channels() -> None:
    """Never worse than one step, at the largest shift where a channel needs the range, and small elsewhere."""
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([8.0, 4, 2, 1, 0.5, 0.01])
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 255
    plain = Grid(scale, round(-128 - low / scale), 8, "away")
    grid = shifted(x, plain)
    assert grid.shifts.tolist() == sorted(grid.shifts.tolist(), reverse=True)
    assert int(grid.shifts[0]) == 3
    assert int(grid.shifts[-1]) == 0
    errors = [(g.dequantize(g.quantize(x)) - x).square().sum(0) for g in (plain, grid)]
    assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
    # An eighth of the step.
    assert float(errors[1][-2]) < float(errors[0][-2]) / 20
    # Its integers are multiples of one scale, so that a layer norm adds them.
    q = grid.quantize(x)
    assert torch.equal(grid.integers(q).double() * grid.scale, grid.dequantize(q))
    assert int(grid.integers(q).abs().max()) <= grid.bound
