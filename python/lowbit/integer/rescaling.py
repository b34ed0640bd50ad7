"""How an integer stands for a real number, and how a sum comes from one such grid to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.ops import int8

# Ties: towards plus infinity, as in (x + half) >> shift, or away from zero, as C's lround and TFLite have it.
ROUNDINGS = ("floor", "nearest", "away")
INT32_MAX = 2**31 - 1
# A shift of int32 by more is not defined in C; to the right, the half that is added must fit, too.
MAX_SHIFT = 30


def round_by(x: Tensor, rounding: str) -> Tensor:
    """Real numbers to integers, as float64."""
    if rounding == "floor":
        return x.floor()
    if rounding == "nearest":
        return (x + 0.5).floor()
    return x.sign() * (x.abs() + 0.5).floor()


def divide(sums: Tensor, counts: Tensor, rounding: str) -> Tensor:
    """int64 sums over positive int64 counts."""
    if rounding == "floor":
        return sums.div(counts, rounding_mode="floor")
    if rounding == "nearest":
        return (2 * sums + counts).div(2 * counts, rounding_mode="floor")
    half = counts.div(2, rounding_mode="floor")
    return torch.where(sums > 0, sums + half, sums - half).div(counts, rounding_mode="trunc")


@dataclass(frozen=True)
class Grid:
    """The integers of an activation: real = scale * (integer - zero).

    Attributes:
        scale: of one step.
        zero: the integer of 0.
        bits: 2 to 16; integers are -2^(bits - 1) to 2^(bits - 1) - 1.
        rounding: of real numbers, one of `ROUNDINGS`.
    """

    scale: float
    zero: int
    bits: int
    rounding: str

    @property
    def least(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def most(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of tensors that hold the integers."""
        return torch.int8 if self.bits <= 8 else torch.int16

    @property
    def steps(self) -> Tensor:
        """The size of a step, float64: (1,), or (C,) where each channel of the last dimension has its own."""
        return torch.tensor([self.scale], dtype=torch.float64, device="cpu")

    def operand(self, q: Tensor) -> Tensor:
        """What products take, int64; less `zero`, it stands for multiples of the scale."""
        return q.long()

    @property
    def bound(self) -> int:
        """The largest absolute value of an operand."""
        return -self.least

    @property
    def span(self) -> int:
        """The largest operand less the least one."""
        return self.most - self.least

    def integers(self, q: Tensor) -> Tensor:
        """Multiples of the scale, int64."""
        return self.operand(q) - self.zero

    def quantize(self, x: Tensor) -> Tensor:
        """The integers of real numbers, int8 or int16; what lies outside saturates."""
        q = round_by(x.to(torch.float64) / self.scale, self.rounding) + self.zero
        return q.clamp(self.least, self.most).to(self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """The real numbers of integers, in float64."""
        return (q.to(torch.float64) - self.zero) * self.scale


@dataclass(frozen=True)
class Rescale:
    """A factor on integer sums, one for all or one a channel.

    Attributes:
        shift: int32 (1,) or (C,): sums are divided by 2^shift; a negative one multiplies.
        multiplier: int32 of the same shape for multiplier / 2^31 * 2^-shift by gemmlowp's rule (`int8.requantize`);
            None for a power of two.
        rounding: of a power of two, "floor" or "nearest".
    """

    shift: Tensor
    multiplier: Tensor | None
    rounding: str

    def apply(self, sums: Tensor, dim: int) -> Tensor:
        """The sums, with channels in dimension `dim`, on the other grid: int64."""
        view = [1] * sums.dim()
        view[dim] = -1
        shift = self.shift.long().reshape(view)
        if self.multiplier is not None:
            return int8.rescale(sums, self.multiplier.reshape(view), shift)
        right = shift.clamp(min=0)
        half = (1 << right >> 1) if self.rounding == "nearest" else 0
        return ((sums << (-shift).clamp(min=0)) + half) >> right

    @property
    def half(self) -> Tensor:
        """What rounding adds to a sum before it is shifted: (1,) or (C,) int64."""
        if self.multiplier is not None or self.rounding != "nearest":
            return torch.zeros_like(self.shift, dtype=torch.int64)
        return 1 << self.shift.long().clamp(min=0) >> 1


def power_of_two(shift: Tensor, rounding: str, where: str) -> Rescale:
    """A shift; ValueError names the node if no int32 can be shifted so."""
    if bool((shift.abs() > MAX_SHIFT).any()):
        raise ValueError(
            f"{where}: sums would be shifted by {shift.tolist()} bits, {MAX_SHIFT} at most"
        )
    return Rescale(shift.to(torch.int32).reshape(-1), None, rounding)


def by_dyadic(factor: Tensor, where: str) -> Rescale:
    """A factor (1,) or (C,) float64; ValueError names the node if it is too large."""
    try:
        multiplier, shift = int8.dyadic(factor.reshape(-1))
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    return Rescale(shift, multiplier, "away")


def check_sums(bound: Tensor | int, where: str) -> None:
    """ValueError names a node whose sums, of at most `bound`, may leave int32."""
    largest = int(torch.as_tensor(bound, dtype=torch.float64, device="cpu").max())
    if largest > INT32_MAX:
        raise ValueError(
            f"{where}: sums may reach {largest}, which overflows int32 ({INT32_MAX}); choose fewer fraction bits, or "
            "a granularity that does so itself"
        )
