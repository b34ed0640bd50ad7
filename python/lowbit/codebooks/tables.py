"""Tables in closed form: FP8 and the constants of built-in formats, quantiles of a distribution, small
floats, sums and steps of powers of two.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from statistics import NormalDist

import numpy as np

from lowbit.codebooks.distributions import Distribution, StudentT

Table = tuple[float, ...]


def to_fp32(v: float) -> float:
    """Rounds to the nearest fp32 value: tables are fp32 wherever they are stored."""
    try:
        return struct.unpack("<f", struct.pack("<f", float(v)))[0]
    except OverflowError:
        raise ValueError(f"table value {v!r} does not fit fp32") from None


def digits_per_byte(base: int) -> int:
    """How many digits of a base fit a byte: the largest d with base^d <= 256."""
    return next(d for d in range(8, 0, -1) if base**d <= 256)


@functools.lru_cache(maxsize=4096)
def int8_step(table: Table | None) -> float | None:
    """The f with table = f * integers in -128 .. 127, or None: what makes int8 products exact."""
    if table is None or not all(math.isfinite(v) for v in table):
        return None
    step = functools.reduce(_gcd, (Fraction(v) for v in table))
    return float(step) if all(-128 <= v / step <= 127 for v in table) else None


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(
        math.gcd(a.numerator * b.denominator, b.numerator * a.denominator),
        a.denominator * b.denominator,
    )


def float8_values(codec: str) -> tuple[float, ...]:
    """All 256 values of OCP FP8 "e4m3" (no infinities, 0x7f is NaN) or "e5m2" (IEEE-like)."""
    exponent_bits, bias = (4, 7) if codec == "e4m3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    top = 2**exponent_bits - 1
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        e = (code >> mantissa_bits) & top
        m = code & (2**mantissa_bits - 1)
        if codec == "e4m3" and code & 0x7F == 0x7F:
            value = math.nan
        elif codec == "e5m2" and e == top:
            value = math.nan if m else math.inf
        elif e == 0:
            value = m * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (2**mantissa_bits + m) * 2.0 ** (e - bias - mantissa_bits)
        values.append(sign * value)
    return tuple(values)


_normal_ppf = NormalDist().inv_cdf


def normal_float(
    bits: int,
    ppf: Callable[[float], float] = _normal_ppf,
    *,
    offset_bits: int | None = None,
) -> tuple[float, ...]:
    """NormalFloat table of `bits` bits (QLoRA, appendix E): quantiles of N(0, 1), scaled to [-1, 1].

    With `ppf`, the same of another distribution that is symmetric about 0; `offset_bits` are the bits
    that the probability of the outermost entries depends on, `bits` by default.
    """
    levels = 2 ** (offset_bits or bits)
    offset = 1 - 0.5 * (1 / (2 * (levels - 1)) + 1 / (2 * levels))
    levels = 2**bits

    def side(points: int) -> list[float]:
        step = (0.5 - offset) / (points - 1)
        return [ppf(offset + i * step) for i in range(points - 1)]

    values = [*side(levels // 2 + 1), 0.0, *(-v for v in side(levels // 2))]
    top = max(values)
    return tuple(sorted(to_fp32(v / top) for v in values))


# As stored in QLoRA checkpoints: the fp32 constants of the authors' code, which differ from
# `normal_float(4)` in the last bit of some entries.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# OCP MX specification 1.0, table 5; code bit 3 is the sign.
E2M1_TABLE = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
# ggml's IQ4_NL codebook.
IQ4_NL_TABLE = tuple(
    float(v) for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)


def as_table(values: Iterable[float]) -> Table:
    """Distinct values in ascending order, rounded to fp32."""
    return tuple(sorted({float(np.float32(v)) + 0.0 for v in values}))


def check_bits(bits: int, low: int, high: int) -> None:
    """Raises unless `bits` is an integer from low to high."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an integer, got {bits!r}")
    if not low <= bits <= high:
        raise ValueError(f"bits must be from {low} to {high}, got {bits}")


def nf(bits: int) -> Table:
    """NormalFloat (QLoRA, arXiv 2305.14314, appendix E) for 2 to 8 bits: quantiles of N(0, 1),
    2^(bits - 1) - 1 below 0, 0, and 2^(bits - 1) above it, scaled to [-1, 1]. For 4 bits the
    constants of the authors' code, to the bit.
    """
    check_bits(bits, 2, 8)
    return NF4_TABLE if bits == 4 else normal_float(bits)


def sf(bits: int, nu: float = 5.0) -> Table:
    """Student Float (Dotzel et al., arXiv 2405.03103): `nf` with the quantiles of Student's t;
    the paper takes nu = 5. The 3-bit table that they print begins at the probability of 4 bits; that 2
    bits do too is our reading.
    """
    check_bits(bits, 2, 8)
    t = StudentT(nu)
    return normal_float(bits, lambda p: float(t.ppf(np.float64(p))), offset_bits=max(bits, 4))


def quantiles(distribution: Distribution, bits: int) -> Table:
    """The quantiles of (i + 1/2) / 2^bits, the middles of equally likely cells, scaled so that the
    largest magnitude is 1 (Distributional Quantization, Cholakov 2023; its text is not public, the
    choice of the middles is our reading).
    """
    check_bits(bits, 1, 8)
    values = distribution.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    return as_table(values / np.abs(values).max())


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> Table:
    """Every finite value of a small float with sign and subnormals and without inf and NaN; +0 and
    -0 are one entry.
    """
    for name, value in (("exponent_bits", exponent_bits), ("mantissa_bits", mantissa_bits)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer from 0, got {value!r}")
    if not 1 <= exponent_bits <= 7 or exponent_bits + mantissa_bits > 7:
        raise ValueError(
            "exponent_bits must be from 1 to 7 and at most 7 with mantissa_bits, "
            f"got {exponent_bits} and {mantissa_bits}"
        )
    values = set()
    for e, m in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = m / 2**mantissa_bits
        value = fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias)
        values |= {value, -value}
    return as_table(values)


def e2m1(variant: str | None = None) -> Table:
    """FP4 E2M1 (OCP MX): +-{0, .5, 1, 1.5, 2, 3, 4, 6}. In the second code of zero, variant
    "super-range" has 8 and "super-precision" 5 (arXiv 2405.03103).
    """
    extra = {None: (), "super-range": (8.0,), "super-precision": (5.0,)}
    if variant not in extra:
        raise ValueError(f"variant must be one of {list(extra)}, got {variant!r}")
    return as_table((*minifloat(2, 1, 1), *extra[variant]))


def e3m0() -> Table:
    """FP4 E3M0: 0 and the powers of two +-{.25, .5, 1, 2, 4, 8, 16}."""
    return minifloat(3, 0, 3)


def fp4_bnb() -> Table:
    """The FP4 of bitsandbytes: +-{0, .0625, 2, 3, 4, 6, 8, 12} / 12."""
    magnitudes = [v / 12 for v in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
    return as_table([*magnitudes, *(-v for v in magnitudes)])


# The sets of powers of two whose sums are the magnitudes of a table, by its bits without the sign.
_APOT_TERMS = {
    2: ((0, 1, 1 / 2, 1 / 4),),
    3: ((0, 1 / 2, 1 / 4, 1 / 16), (0, 1 / 8)),
    4: ((0, 1, 1 / 4, 1 / 16), (0, 1 / 2, 1 / 8, 1 / 32)),
}


def apot(bits: int) -> Table:
    """Additive powers of two (Li et al., arXiv 1909.13144, base bit width 2) for 3 to 5 bits, scaled
    to [-1, 1]; 4 bits: +-{0, .1, .2, .3, .4, .6, .8, 1}.
    """
    check_bits(bits, 3, 5)
    sums = [sum(terms) for terms in itertools.product(*_APOT_TERMS[bits - 1])]
    magnitudes = [s / max(sums) for s in sums]
    return as_table([*magnitudes, *(-m for m in magnitudes)])


def log2(bits: int, signed: bool = True) -> Table:
    """0 and the powers 2^-q, q = 0, 1, ...: 2^(bits - 1) - 1 of either sign, or 2^bits - 1 positive
    ones (for probabilities, as FQ-ViT, arXiv 2111.13824). That zero takes one of the 2^bits codes is
    our reading: the papers let what is too small become 0 without counting it as a code.
    """
    return _log_steps(bits, signed, 1.0)


def log_sqrt2(bits: int, signed: bool = False) -> Table:
    """`log2` with steps of sqrt(2) (RepQ-ViT, arXiv 2212.08254)."""
    return _log_steps(bits, signed, 0.5)


def _log_steps(bits: int, signed: bool, step: float) -> Table:
    # 2^-127 is still an fp32 number, and below 2^-126 no table needs entries.
    check_bits(bits, 2, 7 if signed else 6)
    count = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    values = [2.0 ** (-step * q) for q in range(count)]
    return as_table([0.0, *values, *((-v for v in values) if signed else ())])
