"""The FP8 types, the types of their scales, and how many elements of a matrix share one (OCP OFP8 1.0, OCP MX 1.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The bits of E8M0 in uint8 where torch (before 2.7) has no dtype for them.
E8M0: torch.dtype = getattr(torch, "float8_e8m0fnu", torch.uint8)
E8M0_BIAS = 127
SCALE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Float8:
    """Constants of an FP8 type: sign, exponent, `mantissa` bits."""

    name: str
    max: float
    mantissa: int
    bias: int
    emax: int  # exponent of the largest value
    max_code: int  # of `max`; codes above are infinity or NaN
    overflow: float  # the smallest fp32 that rounds to more than `max`
    overflow_code: int  # what a cast that does not saturate makes of it: NaN or infinity

    @property
    def min_normal(self) -> float:
        """The smallest value with all mantissa bits; below it the step is constant."""
        return 2.0 ** (1 - self.bias)


FLOAT8: dict[torch.dtype, Float8] = {
    torch.float8_e4m3fn: Float8("e4m3", 448.0, 3, 7, 8, 0x7E, 464 + 2**-15, 0x7F),
    torch.float8_e5m2: Float8("e5m2", 57344.0, 2, 15, 15, 0x7B, 61440.0, 0x7C),
}
NAN_CODE = 0x7F


def check_float8(name: str, dtype: torch.dtype) -> Float8:
    """The constants of an FP8 dtype.

    Raises:
        TypeError: `dtype` is another one.
    """
    if dtype not in FLOAT8:
        raise TypeError(f"{name} must be float8_e4m3fn or float8_e5m2, got {dtype}")
    return FLOAT8[dtype]


def e8m0_values(code: Tensor) -> Tensor:
    """2^(code - 127) in fp32, exact, of E8M0 or of its bits in uint8; 255 is NaN (OCP MX 1.0)."""
    code = code.contiguous().view(torch.uint8).to(torch.int32)
    value = torch.ldexp(torch.ones_like(code, dtype=torch.float64), code - E8M0_BIAS)
    return torch.where(code == 255, torch.nan, value).to(torch.float32)


@dataclass(frozen=True)
class Granularity:
    """Blocks of `rows` x `columns` elements; None for all of them. Blocks at the edges may be smaller."""

    name: str
    rows: int | None
    columns: int | None
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES  # the first is the default

    def scale_shape(self, rows: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of a (rows, k) matrix; () for one scale."""
        if self.rows is None:
            return ()
        return (-(-rows // self.rows), 1 if self.columns is None else -(-k // self.columns))

    def block(self, rows: int, k: int) -> tuple[int, int]:
        """Rows and columns of a block of a (rows, k) matrix, each at least 1."""
        return self.rows or max(rows, 1), self.columns or max(k, 1)


GRANULARITIES = {
    g.name: g
    for g in (
        Granularity("tensor", None, None),
        Granularity("row", 1, None),
        Granularity("1x16", 1, 16),
        Granularity("1x128", 1, 128),
        Granularity("128x128", 128, 128),
        Granularity("mx", 1, 32, (E8M0,)),
    )
}


def find_granularity(name: str) -> Granularity:
    """The granularity of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {list(GRANULARITIES)}, got {name!r}")
    return GRANULARITIES[name]


def infer_granularity(scale: Tensor, rows: int, k: int, name: str = "scale") -> Granularity:
    """The granularity of the scales of a (rows, k) matrix, from their shape and dtype.

    Shapes that fit several granularities, such as (R, 1) with K <= 16, mean the same blocks in all of them.

    Args:
        scale: fp32 or bf16; E8M0 for "mx" and only for it.
        rows, k: the matrix.
        name: what an error calls the scales.

    Raises:
        TypeError: the dtype is none of those.
        ValueError: the shape fits no granularity.
    """
    fitting = [g for g in GRANULARITIES.values() if scale.dtype in g.scale_dtypes]
    if not fitting:
        raise TypeError(f"{name} must be float32, bfloat16 or {E8M0} (mx), got {scale.dtype}")
    for g in fitting:
        if scale.shape == g.scale_shape(rows, k):
            return g
    expected = ", ".join(f"{g.scale_shape(rows, k)} ({g.name})" for g in fitting)
    raise ValueError(
        f"{name} of a ({rows}, {k}) matrix must have, in {scale.dtype}, one of the shapes {expected}, got "
        f"{tuple(scale.shape)}"
    )


class Scaled(NamedTuple):
    """A matrix in FP8 and its scales."""

    q: Tensor  # (R, K)
    scale: Tensor
    granularity: Granularity


def scaled(q: Tensor, scale: Tensor, name: str = "scale") -> Scaled:
    """A matrix and its scales, whose shape and dtype say what they are; `infer_granularity` says what it raises."""
    return Scaled(q, scale, infer_granularity(scale, q.shape[0], q.shape[1], name))
