"""Dyadic requantization against the gemmlowp procedures in Python integers, which have no width."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit import int8

INT32 = (-(2**31), 2**31 - 1)


def high_mul(a: int, b: int) -> int:
    """SaturatingRoundingDoublingHighMul: a nudge of the product's sign, then division towards 0."""
    if a == b == INT32[0]:
        return INT32[1]
    product = a * b
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    return nudged // 2**31 if nudged >= 0 else -(-nudged // 2**31)


def divide_by_pot(x: int, exponent: int) -> int:
    """RoundingDivideByPOT: the remainder against half, one more for negative x."""
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


def oracle(acc: int, multiplier: int, shift: int, zero_point: int, low: int) -> int:
    left = min(max(acc << max(-shift, 0), INT32[0]), INT32[1])
    y = divide_by_pot(high_mul(left, multiplier), max(shift, 0)) + zero_point
    return min(max(y, low), 127)


accumulators = st.one_of(st.integers(*INT32), st.integers(-3000, 3000))


@given(accumulators, st.integers(2**30, 2**31 - 1), st.integers(-31, 31), st.integers(-128, 127))
@example(INT32[0], 2**31 - 1, 0, 0)
@example(INT32[0], 2**30, 31, 0)
@example(-3, 2**30, 0, 0)  # -1.5: the product rounds ties up
@example(-3, 2**30, 1, 0)
@example(5, 2**30, 1, -128)
@settings(max_examples=400, deadline=None)
def test_bit_for_bit_gemmlowp(acc: int, multiplier: int, shift: int, zero_point: int):
    tensors = (torch.tensor([[v]], dtype=torch.int32) for v in (acc,))
    m, s = (torch.tensor(v, dtype=torch.int32) for v in (multiplier, shift))
    got = int8.requantize(*tensors, m, s, zero_point)
    assert got.dtype == torch.int8
    assert got.tolist() == [[oracle(acc, multiplier, shift, zero_point, -128)]]


def test_ties():
    """The product towards plus infinity, the shift away from zero."""
    acc = torch.tensor([[-3, -1, 1, 3]], dtype=torch.int32)
    half = torch.tensor(2**30, dtype=torch.int32)
    no, one = (torch.tensor(s, dtype=torch.int32) for s in (0, 1))
    assert int8.requantize(acc, half, no).tolist() == [[-1, 0, 1, 2]]
    assert int8.requantize(acc * 2, half, one).tolist() == [[-2, -1, 1, 2]]


def test_per_channel_and_relu():
    acc = torch.randint(-(2**24), 2**24, (3, 4, 17), dtype=torch.int32)
    factors = torch.logspace(-7, -4, 17, dtype=torch.float64)
    multiplier, shift = int8.dyadic(factors)
    got = int8.requantize(acc, multiplier, shift, zero_point=-9, low=-9)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in acc.shape)).tolist():
        n = index[-1]
        arguments = int(acc[tuple(index)]), int(multiplier[n]), int(shift[n]), -9, -9
        assert int(got[tuple(index)]) == oracle(*arguments)
    # The shift is 13 or more, so the rounding of the product counts 2^-14 at most.
    exact = (acc * factors - 9).clamp(-9, 127)
    assert (got - exact).abs().max() <= 0.5 + 2**-13
    assert got.min() == -9
    assert got.max() == 127


@given(st.floats(2**-32, 2**30))
@example(0.5)
@example(1.0)
@example(1 - 2**-53)
@example(2**-32)
@settings(max_examples=200, deadline=None)
def test_dyadic_numbers_are_the_nearest(factor: float):
    multiplier, shift = (int(t) for t in int8.dyadic(factor))
    assert 2**30 <= multiplier < 2**31
    made = Fraction(multiplier) / 2**31 / Fraction(2) ** shift
    assert abs(made - Fraction(factor)) <= Fraction(1, 2**32) / Fraction(2) ** shift
    mantissa, exponent = math.frexp(factor)
    q = math.floor(Fraction(mantissa) * 2**31 + Fraction(1, 2))
    assert (multiplier, shift) == ((q, -exponent) if q < 2**31 else (2**30, -exponent - 1))


def test_factors_out_of_range():
    assert [t.tolist() for t in int8.dyadic(torch.tensor([0.0, 1e-12]))] == [[0, 0], [0, 0]]
    for bad in (-1.0, math.nan, math.inf, 2.0**31, 2.0**31 - 2**-22):
        with pytest.raises(ValueError, match="factor must be"):
            int8.dyadic(bad)


def test_an_integer_linear_is_the_float_one():
    """int8 x int8 in int32, requantized per channel, against the same in fp64."""
    q = torch.randint(-127, 128, (9, 300), dtype=torch.int32)
    w = torch.randint(-127, 128, (20, 300), dtype=torch.int32)
    scales = torch.rand(20, dtype=torch.float64) * 1e-3 + 1e-4
    y = int8.requantize(q @ w.T, *int8.dyadic(scales))
    exact = ((q.double() @ w.T.double()) * scales).clamp(-128, 127)
    # The shift is 9 or more, so the rounding of the product counts 2^-10 at most.
    assert (y - exact).abs().max() <= 0.5 + 2**-9


BAD = [
    ((torch.zeros(3),), TypeError, "acc must be int32, got torch.float32"),
    ((None, torch.zeros(3)), TypeError, "multiplier must be int32"),
    (
        (None, None, torch.zeros(2, dtype=torch.int32)),
        ValueError,
        r"shift must have one element or",
    ),
    ((None, -torch.ones(1, dtype=torch.int32)), ValueError, "multiplier must be 0 to 2147483647"),
    ((None, None, torch.full((3,), 32, dtype=torch.int32)), ValueError, "shift must be -31 to 31"),
    ((None, None, None, 128), ValueError, "zero_point must be -128 to 127, got 128"),
    ((None, None, None, 0, -129), ValueError, "low must be -128 to 127, got -129"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:20])
def test_bad_arguments(arguments, error, message):
    good = [torch.zeros(2, 3, dtype=torch.int32), *(torch.ones(1, dtype=torch.int32),) * 2]
    arguments = (
        [g if a is None else a for a, g in zip(arguments, good, strict=False)]
        + list(arguments[3:])
        + good[len(arguments) :]
    )
    with pytest.raises(error, match=message):
        int8.requantize(*arguments)
