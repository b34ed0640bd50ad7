"""Integer softmax, GELU and layer norm: Python's integers exactly, and real numbers within bounds that are derived."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.integer.functions import (
    NORM_BITS,
    SOFTMAX_BITS,
    PolynomialExponential,
    ShiftExponential,
    integer_sqrt,
    layer_norm,
    log_round,
    log_softmax,
    norm_lift,
    shift_gelu,
    softmax,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SCALES = (0.004, 0.02, 0.05, 0.3, 1.0, 5.0)


def plain_shift(x: int, e: ShiftExponential) -> int:
    """The paper's lines in Python's integers."""
    x = x << e.lift if e.lift >= 0 else (x + (1 << (-e.lift - 1))) >> -e.lift
    x = max(x + (x >> 1) - (x >> 4), -e.unit * e.halvings)
    q = x // -e.unit
    r = x + q * e.unit
    # floor((r / 2 + unit) * 2^(n - q))
    return ((r + 2 * e.unit) * 2**e.halvings) // 2 ** (q + 1)


def plain_polynomial(x: int, e: PolynomialExponential) -> int:
    x = x << e.lift if e.lift >= 0 else (x + (1 << (-e.lift - 1))) >> -e.lift
    z = min(31, -x // e.ln2)
    r = x + z * e.ln2
    return ((r + e.linear) * r + e.one) >> z if z < 31 else 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [2, 17, 200, 1 << 14])
def test_exponentials(scale: float, count: int) -> None:
    """Bit for bit Python's, never above the one of 0, and sums of `count` fit int32."""
    x = torch.cat([torch.arange(-4000, -300, 37), torch.arange(-300, 1)])
    for e, plain in (
        (ShiftExponential.of(scale, count), plain_shift),
        (PolynomialExponential.of(scale, count), plain_polynomial),
    ):
        got = e(x)
        assert got.tolist() == [plain(v, e) for v in x.tolist()]  # type: ignore[operator]
        assert int(got.max()) == int(got[-1])
        assert int(got.min()) >= 0
        assert int(got[-1]) * count < 2**31
        # 1 + r / 2 is up to 6.2 % above 2^r, and 1.4375 0.4 % below log2(e); floors and the unit add 1/2^8 each.
        relative = 0.062 if isinstance(e, ShiftExponential) else 0.005
        real = torch.exp(x * scale)
        error = got / got[-1] - real
        slope = (0.0037 + 2**-8) * -x * scale if isinstance(e, ShiftExponential) else 0.004
        assert (error.abs() <= real * (relative + slope) + 2**-7).all()


def test_exponentials_of_any_scale() -> None:
    """A step of 10^6 or of 10^-6 overflows nothing and divides by nothing."""
    x = torch.tensor([-(2**15), -1000, -1, 0])
    for scale in (1e-6, 1e6):
        for make in (ShiftExponential.of, PolynomialExponential.of):
            e = make(scale, 16)
            got = e(x) / e(x)[-1]
            assert (got - torch.exp(x * scale)).abs().max() < 0.05
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            ShiftExponential.of(bad, 16)
    with pytest.raises(ValueError, match="count must be 1 to 2\\^20"):
        PolynomialExponential.of(0.1, 1 << 21)


def logits() -> Tensor:
    """Rows of int8 logits of several widths, and of one large value among equal ones."""
    torch.manual_seed(0)
    rows = [(torch.randn(200, 17) * w).round() for w in (5, 20, 60, 200)]
    rows.append(torch.where(torch.eye(17) > 0, 40.0, 0.0) * torch.linspace(0, 1, 17).round())
    return torch.cat(rows).clamp(-128, 127).long()


def test_softmax_of_the_polynomial_is_below_2_to_the_minus_7() -> None:
    """e^p is 0.2 % off and floors of the unit up to 0.3 %, so a probability is by a quarter of twice that; 8 bits
    round by 2^-9 more. Largest error seen: 0.0027.
    """
    x = logits()
    for scale in SCALES:
        p = softmax(x, PolynomialExponential.of(scale, 17), 8)
        error = (p / 256 - torch.softmax(x * scale, -1)).abs().max()
        assert error < 2**-7


def test_shiftmax_is_below_2_to_the_minus_5() -> None:
    """2^r as 1 + r / 2 is up to 6.2 % off, between two probabilities near 1/2 by a quarter of that, 0.0154, and 8 bits
    round by 2^-8: the paper's form cannot be below 2^-7 for every input. It is so where values spread.
    """
    x = logits()
    worst = 0.0
    for scale in SCALES:
        p = softmax(x, ShiftExponential.of(scale, 17), 8)
        worst = max(worst, float((p / 256 - torch.softmax(x * scale, -1)).abs().max()))
    assert 2**-7 < worst < 2**-5
    e = ShiftExponential.of(0.01, 17)
    p = softmax(x[:200], e, 8) / 256
    assert (p - torch.softmax(x[:200] * 0.01, -1)).abs().max() < 2**-7


def test_softmax_is_pythons() -> None:
    x = logits()[::7]
    e = ShiftExponential.of(0.05, 17)
    for row, got in zip(x.tolist(), softmax(x, e, 7).tolist(), strict=True):
        own = [plain_shift(v - max(row), e) for v in row]
        factor = (2**31 - 1) // sum(own)
        assert got == [v * factor // 2**24 for v in own]
        assert sum(got) <= 128


def test_log_round() -> None:
    x = torch.cat([torch.arange(1, 5000), torch.tensor([2**30, 2**31 - 1])])
    want = []
    for v in x.tolist():
        k = v.bit_length() - 1
        want.append(k + (2 * v >= 3 << k))
    assert log_round(x).tolist() == want


@pytest.mark.parametrize("bits", [4, 8])
def test_log_softmax(bits: int) -> None:
    """The nearest power of two of each probability, or the code of 0 below the last one."""
    x, most = logits(), 2**bits - 2
    e = PolynomialExponential.of(0.05, 17)
    codes = log_softmax(x, e, most)
    assert int(codes.min()) == 0
    assert int(codes.max()) <= most + 1
    p = torch.softmax(x * 0.05, -1, dtype=torch.float64)
    back = torch.exp2(-codes.double()).masked_fill(codes == most + 1, 0)
    # 1 / p is 0.75 to 1.5 times 2^q; a ratio of 2.5 is first rounded to 3, which is the 1.5 of 2; exponentials are off
    # by up to 3 % where p is not tiny.
    real = p > 2**-12
    assert ((back / p)[real & (back > 0)] < 1.5 * 1.03).all()
    assert ((back / p)[real] > 0.625 / 1.03).all()
    for row, got in zip(x[::9].tolist(), codes[::9].tolist(), strict=True):
        own = [plain_polynomial(v - max(row), e) for v in row]
        for v, code in zip(own, got, strict=True):
            ratio = (sum(own) + v // 2) // v if v else 0
            k = ratio.bit_length() - 1
            want = k + (2 * ratio >= 3 << max(k, 0)) if v else most + 1
            assert code == min(want, most + 1)


def test_shift_gelu() -> None:
    """The paper's form is x sigmoid(1.702 x) up to 1.5 % of a sigmoid, which is 0.0203 off GELU: of an 8-bit range
    of 4 or more, at most one step (2^-7 of the range).
    """
    for top in (4.0, 8.0):
        x = torch.arange(-128, 128)
        got, scale = shift_gelu(x, top / 127)
        real = x * top / 127
        gelu = torch.nn.functional.gelu(real)
        assert (got * scale - real * torch.sigmoid(1.702 * real)).abs().max() < 2**-5
        assert (got * scale - gelu).abs().max() / top < 2**-7
        # 0 stays 0; what is far below vanishes, and what is far above stays.
        assert int(got[128]) == 0
        assert abs(float(got[0] * scale)) < 0.01
        assert float(got[-1] * scale) == pytest.approx(top, abs=0.02)


def test_roots_are_pythons() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randint(2**29, 2**32, (2000,)), torch.arange(2**16 - 3, 2**16) ** 2])
    x = torch.cat([x, torch.arange(23171, 23300) ** 2, torch.arange(23171, 23300) ** 2 - 1])
    x = x[x >= 2**29]
    assert integer_sqrt(x).tolist() == [math.isqrt(v) for v in x.tolist()]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("count", [7, 32, 384])
def test_layer_norm(bits: int, count: int) -> None:
    """Against real numbers on the same integers, 2^-7 and less: a mean is off by half of a lifted step, and a lifted
    deviation is 2^6 of them or more; root and factor are off by 2^-14 each of a value of at most sqrt(K) = 20.
    """
    torch.manual_seed(0)
    half = 1 << (bits - 1)
    lift = norm_lift(2 * half - 1, count)
    # Deviations of an eighth of the range and more, and what all ends of it give.
    x = (torch.randn(300, count) * half * torch.linspace(0.25, 1, 300)[:, None]).round()
    x[:2] = torch.where(torch.rand(2, count) < 0.5, -half, half - 1).float()
    x = x.clamp(-half, half - 1).long()
    lifted = x * 2.0**lift
    assert float(((lifted - lifted.mean(-1, keepdim=True)) ** 2).sum(-1).max()) < 2**31
    got = layer_norm(x, lift, 0)
    assert int(got.abs().max()) < 2**31
    real = torch.nn.functional.layer_norm(x.double(), (count,), eps=0)
    assert (got * math.sqrt(count) / 2**NORM_BITS - real).abs().max() < 2**-7


def test_layer_norm_of_equal_numbers() -> None:
    """Is 0, as the mean of equal numbers is each of them."""
    x = torch.tensor([[5] * 8, [-128] * 8, [0] * 8])
    for eps in (0, 3):
        assert layer_norm(x, norm_lift(255, 8), eps).eq(0).all()


def test_softmax_sums_stay_in_int32() -> None:
    """Of 2^20 equal numbers."""
    x = torch.zeros(1, 1 << 20, dtype=torch.int64)
    e = PolynomialExponential.of(0.1, 1 << 20)
    assert int(e(x).sum()) < 2**31
    assert int(softmax(x, e, SOFTMAX_BITS).max()) == 0
