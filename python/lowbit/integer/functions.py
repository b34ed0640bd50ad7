"""Softmax, GELU and layer norms that never leave integers: I-ViT's (arXiv 2207.01405) and FQ-ViT's (arXiv 2111.13824).

Constants come from a scale before anything runs; what runs are adds, products, shifts, comparisons and divisions of
integers, held as int64, that fit int32 at any step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The integer of e^0 has at most so many bits: a probability is off by 2^(20 - 31) at most through its division.
_ONE_BITS = 20
# I-ViT's n, the halvings after which an exponential is 0.
_HALVINGS = 15
# Bits of the unit of Shiftmax's exponents.
_UNIT_BITS = 9
# 16 times 1 + 1/2 + 1/8 + 1/16, which is 1.702 to ShiftGELU, as 1 + 1/2 - 1/16 is log2(e) to Shiftmax.
_SIGMOID = 27
# A step of e^-1 or less needs no more.
_MAX_LIFT = 16
# The polynomial of FQ-ViT and I-BERT for e^p, p in (-ln 2, 0].
_A, _B, _C = 0.35815147, 0.96963238, 1.0
# Where Newton's iteration for a root starts, and how often it runs.
_ROOT_START, _ROOT_STEPS = 1 << 16, 10
# A normalized value over sqrt(K) has so many fraction bits.
NORM_BITS = 30
# Fraction bits of a probability that softmax gives, and of the sigmoid in a GELU.
SOFTMAX_BITS = 15


class Exponential(Protocol):
    """e^(scale x) for integers x of at most 0, as an integer over that of x = 0."""

    def __call__(self, x: Tensor) -> Tensor:
        """(...) int64 of at most 0 to int64 of at least 0."""
        ...


def _room(scale: float, count: int) -> int:
    """Bits that an exponential may have where `count` of them are added."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if not 1 <= count <= 1 << 20:
        raise ValueError(f"count must be 1 to 2^20, or sums may overflow int32, got {count}")
    return min(_ONE_BITS, 30 - (count - 1).bit_length())


def shifted(x: Tensor, lift: int) -> Tensor:
    """x * 2^lift, rounded to nearest with ties up."""
    return x << lift if lift >= 0 else (x + (1 << (-lift - 1))) >> -lift


def _lift(one: float, bits: int) -> int:
    """The lift at which `one`, a number that is multiplied by 2^lift, is below 2^bits and at least half of it."""
    return min(_MAX_LIFT, bits - math.frexp(one)[1])


def _lifted(x: Tensor, lift: int, least: int) -> Tensor:
    """x * 2^lift, and what is below `least` as that."""
    return shifted(x.clamp(min=(least >> lift if lift >= 0 else least << -lift) - 1), lift).clamp(
        min=least
    )


@dataclass(frozen=True)
class ShiftExponential:
    """I-ViT's: e^x = 2^(x log2 e), and 2^r is 1 + r / 2 for r in (-1, 0]: at most 6.2 % above it.

    Interpretation: x is first multiplied by 2^lift, so that the unit has 9 bits; n is 15 where sums leave room.

    Attributes:
        lift: of x.
        unit: the integer of 1, -x0 of the paper.
        halvings: n; the result for 0 is unit * 2^n.
    """

    lift: int
    unit: int
    halvings: int

    @classmethod
    def of(cls, scale: float, count: int) -> ShiftExponential:
        """For integers that stand for scale * x, where `count` results are added.

        Raises:
            ValueError: scale is not positive and finite, or count is not 1 to 2^20.
        """
        halvings = min(_HALVINGS, _room(scale, count) - _UNIT_BITS)
        lift = _lift(1 / scale, _UNIT_BITS)
        return cls(lift, max(1, math.floor(math.ldexp(1 / scale, lift))), halvings)

    def __call__(self, x: Tensor) -> Tensor:
        """(...) int64 of at most 0 to int64 of at most unit * 2^n."""
        x = _lifted(x, self.lift, -self.unit * self.halvings)
        x = x + (x >> 1) - (x >> 4)
        x = x.clamp(min=-self.unit * self.halvings)
        whole = (-x).div(self.unit, rounding_mode="floor")
        rest = x + self.unit * whole
        return ((rest + 2 * self.unit) << self.halvings) >> (whole + 1)


@dataclass(frozen=True)
class PolynomialExponential:
    """FQ-ViT's and I-BERT's: e^x = 2^-z e^p, p in (-ln 2, 0], where e^p is a polynomial of degree 2, off by 0.2 %.

    Attributes:
        lift: x is multiplied by 2^lift.
        ln2: its integer.
        linear, one: of r (r + linear) + one, the polynomial over its first coefficient.
    """

    lift: int
    ln2: int
    linear: int
    one: int

    @classmethod
    def of(cls, scale: float, count: int) -> PolynomialExponential:
        """For integers that stand for scale * x, where `count` results are added.

        Raises:
            ValueError: scale is not positive and finite, or count is not 1 to 2^20.
        """
        # one = C / A / scale^2 has two bits more for each of the lift.
        room = _room(scale, count)
        bits = room - math.frexp(_C / _A)[1]
        lift = _lift(1 / scale, bits // 2)
        unit = math.ldexp(1 / scale, lift)
        return cls(
            lift,
            max(1, math.floor(math.log(2) * unit)),
            math.floor(_B / _A * unit),
            max(1, math.floor(_C / _A * unit * unit)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(...) int64 of at most 0 to int64 of at most `one`."""
        x = _lifted(x, self.lift, -31 * self.ln2)
        whole = (-x).div(self.ln2, rounding_mode="floor")
        rest = x + self.ln2 * whole
        return (rest * (rest + self.linear) + self.one) >> whole


def softmax(x: Tensor, exponential: Exponential, bits: int = SOFTMAX_BITS) -> Tensor:
    """Probabilities over the last dimension: Shiftmax, with I-ViT's exponential.

    Args:
        x: (..., T) int64.
        exponential: made for sums of T.
        bits: fraction bits of the result; b - 1 for the paper's b.

    Returns:
        (..., T) int64, each probability times 2^bits, rounded down; 2^bits at most.
    """
    e = exponential(x - x.amax(-1, keepdim=True))
    factor = torch.div(2**31 - 1, e.sum(-1, keepdim=True), rounding_mode="floor")
    return (e * factor) >> (31 - bits)


def log_round(x: Tensor) -> Tensor:
    """log2 of positive int64 below 2^32, rounded: up where x is 1.5 times a power of two or more."""
    thresholds = [3 << i for i in range(32)]
    return torch.stack([2 * x >= t for t in thresholds]).sum(0)


def log_softmax(x: Tensor, exponential: Exponential, most: int) -> Tensor:
    """FQ-ViT's Log-Int-Softmax: codes q of probabilities 2^-q.

    Interpretation: the code of 0 is most + 1, one of the codes of b bits, where the paper has a mask beside them.

    Args:
        x: (..., T) int64.
        exponential: made for sums of T.
        most: the code of the least probability above 0; 2^b - 2 for b bits.

    Returns:
        (..., T) int64, 0 to most + 1.
    """
    e = exponential(x - x.amax(-1, keepdim=True))
    # An exponential of 0 has a ratio that is beyond all codes.
    divisor = e.clamp(min=1)
    ratio = (e.sum(-1, keepdim=True) + (divisor >> 1)).div(divisor, rounding_mode="floor")
    return log_round(ratio).masked_fill(e == 0, most + 1).clamp(max=most + 1)


def shift_gelu(x: Tensor, scale: float) -> tuple[Tensor, float]:
    """I-ViT's ShiftGELU: x sigmoid(1.702 x), which is off by 0.0203 from x Phi(x) by itself.

    Interpretation: exponentials are taken of values less max(x, 0) of each element, not of the row.

    Args:
        x: (...) int64 that stands for scale * x, of at most 15 bits and a sign.
        scale: positive.

    Returns:
        (...) int64 of the same shape, and their scale.
    """
    # Of 16 times 1.702 x, so that its shifts lose no bit.
    exponential = ShiftExponential.of(scale / 16, 2)
    top = x.clamp(min=0)
    own, other = (exponential(_SIGMOID * (part - top)) for part in (x, torch.zeros_like(x)))
    factor = torch.div(2**31 - 1, own + other, rounding_mode="floor")
    sigmoid = (own * factor) >> (31 - SOFTMAX_BITS)
    return x * sigmoid, math.ldexp(scale, -SOFTMAX_BITS)


def integer_sqrt(x: Tensor) -> Tensor:
    """floor(sqrt(x)) by Newton's iteration from 2^16, ten times, for int64 from 2^29 to 2^32 - 1."""
    root = torch.full_like(x, _ROOT_START)
    for _ in range(_ROOT_STEPS):
        root = (root + x.div(root, rounding_mode="floor")) >> 1
    return root - (root * root > x).long()


def norm_lift(span: int, count: int) -> int:
    """By how many bits inputs of a layer norm may be lifted so that sums of squares fit int32.

    Args:
        span: the largest input less the least one.
        count: K.
    """
    # The mean squared distance from a mean is at most the square of half of the span.
    return (30 - (count - 1).bit_length()) // 2 - ((span + 1) // 2).bit_length()


def layer_norm(x: Tensor, lift: int, eps: int) -> Tensor:
    """(x - mean) / sqrt(sum (x - mean)^2) over the last dimension, K.

    Args:
        x: (..., K) int64.
        lift: from `norm_lift`.
        eps: what is added to the sum of squares of lifted values.

    Returns:
        (..., K) int64 with `NORM_BITS` fraction bits; times sqrt(K), it is the normalized value.
    """
    x = shifted(x, lift)
    count = x.shape[-1]
    mean = (2 * x.sum(-1, keepdim=True) + count).div(2 * count, rounding_mode="floor")
    y = x - mean
    squares = ((y * y).sum(-1, keepdim=True) + eps).clamp(min=1)
    # Pairs of leading zeros, so that the root has all its bits.
    pairs = torch.stack([squares < 1 << (29 - 2 * i) for i in range(15)]).sum(0)
    root = integer_sqrt(squares << (2 * pairs))
    factor = torch.div(1 << NORM_BITS, root, rounding_mode="floor")
    return (y << pairs) * factor
