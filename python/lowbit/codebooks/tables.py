"""Tables in closed form: quantiles of a distribution, small floats, sums and steps of powers of two."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from lowbit.codebooks.distributions import Distribution, StudentT
from lowbit.tables import NF4_TABLE, normal_float

Table = tuple[float, ...]


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
