"""Grids of activations that are not uniform: powers of two, twin steps, and factors per channel, as integer operands.

A code stands for an integer of a small table, which products take: so they stay products of integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.integer.rescaling import Grid

# The least value of GELU.
GELU_LEAST = -0.16997124254703522


@dataclass(frozen=True)
class Coded(Grid):
    """Codes 0 .. 2^bits - 1 as uint8: real = scale * table[code]; made by `log2`, `log_sqrt2` and the two `twin`s.

    Attributes:
        table: int64, of 2^bits entries or fewer: codes beyond are not used.
        used: the codes that quantizing gives, int64 (U,), by ascending value.
        bounds: float64 (U - 1,): from bounds[i], a real number has the code used[i + 1].
    """

    table: Tensor
    used: Tensor
    bounds: Tensor

    @property
    def least(self) -> int:
        """0."""
        return 0

    @property
    def most(self) -> int:
        """The largest code."""
        return self.table.numel() - 1

    @property
    def dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    @property
    def bound(self) -> int:
        """The largest absolute value of the table."""
        return int(self.table.abs().max())

    def operand(self, q: Tensor) -> Tensor:
        """The integers of codes."""
        return self.table[q.long()]

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of real numbers."""
        place = torch.bucketize(x.to(torch.float64), self.bounds, right=True)
        return self.used[place].to(torch.uint8)

    def encode(self, p: Tensor, fraction: int) -> Tensor:
        """The codes of integers p (int64) with so many fraction bits, by comparisons of integers: int64."""
        bounds = (self.bounds * 2**fraction).ceil().long()
        return self.used[torch.bucketize(p, bounds, right=True)]

    def dequantize(self, q: Tensor) -> Tensor:
        """The real numbers of codes, in float64."""
        return self.operand(q).to(torch.float64) * self.scale


def _fractions(bits: int, room: int, per_octave: int) -> int:
    """The largest code of a logarithmic grid whose values have `room` bits: 2^bits - 2, or less."""
    return min((1 << bits) - 2, room * per_octave)


def log2(bits: int, room: int) -> Coded:
    """FQ-ViT's grid of probabilities: code q is 2^-q, the largest code 0.

    A probability is rounded up from 1.5 times a power of two.

    Args:
        bits: of a code, 2 to 8.
        room: bits that an operand may have: codes beyond are not used, as their values are not.
    """
    most = _fractions(bits, room, 1)
    codes = torch.arange(most + 1, dtype=torch.int64, device="cpu")
    table = torch.cat([1 << (most - codes), torch.zeros_like(codes[:1])])
    # Between 2^-q and 2^-(q + 1); half of the last one is 0.
    bounds = 0.75 * torch.exp2(-codes.flip(0).to(torch.float64))
    return Coded(2.0**-most, 0, bits, "away", table, _descending(most), bounds)


def log_sqrt2(bits: int, room: int) -> Coded:
    """RepQ-ViT's grid of probabilities, log-sqrt2: code q is 2^(-q / 2), the largest code 0.

    As its change to log2 has it, a code is 2^-ceil(q / 2), times sqrt(2) where q is odd; here the two are integers of a
    table with `room` bits. -2 log2 of a probability is rounded to nearest.

    Args:
        bits: of a code, 2 to 8.
        room: bits that an operand may have.
    """
    most = _fractions(bits, room - 1, 2)
    codes = torch.arange(most + 1, dtype=torch.int64, device="cpu")
    octaves, odd = (codes + 1) >> 1, codes & 1
    values = torch.exp2(room - octaves.to(torch.float64)) * (1 + odd * (math.sqrt(2) - 1))
    table = torch.cat([(values + 0.5).floor().long(), torch.zeros_like(codes[:1])])
    bounds = torch.exp2(-(codes.flip(0).to(torch.float64) + 0.5) / 2)
    return Coded(2.0**-room, 0, bits, "away", table, _descending(most), bounds)


def _descending(most: int) -> Tensor:
    """Codes by ascending value: that of 0, most + 1, is the first."""
    return torch.arange(most + 1, -1, -1, dtype=torch.int64, device="cpu")


def twin_softmax(bits: int, split: int) -> Coded:
    """PTQ4ViT's twin uniform grid of probabilities: the highest bit of a code says which of two steps it counts.

    Args:
        bits: of a code, 3 to 8.
        split: probabilities below 2^-split have steps of 2^-split / (2^(bits - 1) - 1), the others those of 1.
    """
    half = 1 << (bits - 1)
    k = torch.arange(half, dtype=torch.int64, device="cpu")
    table = torch.cat([k, k << split])
    scale = math.ldexp(1 / (half - 1), -split)
    # Large steps from the first that is not below the split; with split 0 they are the small ones.
    high = k[(k << split) >= half - 1] if split else k[half:]
    used = torch.cat([k, high + half])
    values = table[used].to(torch.float64) * scale
    return Coded(scale, 0, bits, "away", table, used, (values[1:] + values[:-1]) / 2)


def twin_gelu(bits: int, step: float) -> Coded:
    """PTQ4ViT's twin uniform grid of GELU's results: the highest bit of a code is the sign.

    Positive steps are a power of two of the negative ones, so that both are integers: the largest power at which
    GELU's least value, -0.17, is still in the range.

    Args:
        bits: of a code, 3 to 8.
        step: of positive values.
    """
    half = 1 << (bits - 1)
    least = -GELU_LEAST / (half - 1)
    shift = max(0, math.floor(math.log2(step / least)))
    k = torch.arange(half, dtype=torch.int64, device="cpu")
    table = torch.cat([k << shift, -k])
    used = torch.cat([k[1:].flip(0) + half, k])
    scale = math.ldexp(step, -shift)
    values = table[used].to(torch.float64) * scale
    return Coded(scale, 0, bits, "away", table, used, (values[1:] + values[:-1]) / 2)


@dataclass(frozen=True)
class Shifted(Grid):
    """FQ-ViT's power-of-two factors: real = scale * 2^shifts[c] * (integer - zero) for channel c, the last dimension.

    Attributes:
        shifts: (C,) int64, 0 to 3.
    """

    shifts: Tensor

    @property
    def steps(self) -> Tensor:
        """(C,) float64."""
        return self.scale * torch.exp2(self.shifts.to(torch.float64))

    @property
    def bound(self) -> int:
        """As a multiple of the scale."""
        most = max(self.most - self.zero, self.zero - self.least)
        return most << int(self.shifts.max())

    @property
    def span(self) -> int:
        """As a multiple of the scale."""
        return (self.most - self.least) << int(self.shifts.max())

    def operand(self, q: Tensor) -> Tensor:
        """Less the zero point, and shifted."""
        return (q.long() - self.zero) << self.shifts

    def integers(self, q: Tensor) -> Tensor:
        """The operands."""
        return self.operand(q)

    def quantize(self, x: Tensor) -> Tensor:
        """int8 or int16; what lies outside saturates."""
        return super().quantize(x.to(torch.float64) / torch.exp2(self.shifts.to(torch.float64)))

    def dequantize(self, q: Tensor) -> Tensor:
        """In float64."""
        return self.operand(q).to(torch.float64) * self.scale


def shifted(x: Tensor, grid: Grid, octaves: int = 3) -> Shifted:
    """Factors for the channels of x (..., C): those of 0 to 3 with the least squared error.

    Args:
        x: real numbers of a layer norm's input.
        grid: of all of them together, whose step 2^octaves of the new ones have.
        octaves: the largest shift.
    """
    x = x.flatten(0, -2).to(torch.float64)
    base = math.ldexp(grid.scale, -octaves)
    errors = []
    for shift in range(octaves + 1):
        one = Grid(math.ldexp(base, shift), grid.zero, grid.bits, grid.rounding)
        errors.append((one.dequantize(one.quantize(x)) - x).square().sum(0))
    shifts = torch.stack(errors).argmin(0)
    return Shifted(base, grid.zero, grid.bits, grid.rounding, shifts)
