"""The two FP8 types and the types of their scales: constants and checks (OCP OFP8 1.0 and OCP MX 1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
