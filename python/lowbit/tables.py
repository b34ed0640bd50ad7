"""Values of codes: FP8, NormalFloat, and the tables of the built-in formats. Pure Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from statistics import NormalDist


def to_fp32(v: float) -> float:
    """Rounds to the nearest fp32 value: tables are fp32 wherever they are stored."""
    try:
        return struct.unpack("<f", struct.pack("<f", float(v)))[0]
    except OverflowError:
        raise ValueError(f"table value {v!r} does not fit fp32") from None


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
