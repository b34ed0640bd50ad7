"""What the tests of FP8 share: hard inputs, comparisons bit for bit."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import _C
from lowbit.float8 import E8M0, FLOAT8
from lowbit.reference import fp8 as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TYPES = tuple(FLOAT8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [isa for isa in ("scalar", "avx2", "avx512") if isa in _C.isa_active()]
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
# Of numpy, in which the interpreter computes.
nan_is_no_mistake = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def codes(t: Tensor) -> Tensor:
    """The bytes of FP8 or E8M0."""
    return t.contiguous().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, the sign of zero too, all NaN being one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (reference.scale_values(t) if t.dtype == E8M0 else t.float() for t in (a, b))
    a, b = (torch.where(t.isnan(), torch.nan, t).view(torch.int32) for t in (a, b))
    return torch.equal(a, b)


@functools.cache
def floats() -> Tensor:
    """More than a million floats: random bits, every bf16 and fp16 number, both sides of all midpoints of codes."""
    random = torch.from_numpy(
        np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    )
    half = torch.arange(-(2**15), 2**15).to(torch.int16)
    parts = [random, half.view(torch.bfloat16).float(), half.view(torch.float16).float()]
    for dtype in TYPES:
        values = torch.arange(FLOAT8[dtype].max_code + 1, dtype=torch.uint8).view(dtype).float()
        values = torch.cat((values, torch.tensor([2 * values[-1] - values[-2]])))
        middle = (values[1:] + values[:-1]) / 2
        near = torch.cat(
            [middle, *(middle.nextafter(torch.full_like(middle, to)) for to in (0, math.inf))]
        )
        parts += [values, near, -values, -near]
    # Around what the random ones seldom hit.
    scales = torch.randn(2**18) * torch.exp2(torch.randint(-20, 20, (2**18,)))
    return torch.cat([*parts, scales])


def special(rows: int, k: int, dtype: torch.dtype = torch.float32, finite: bool = True) -> Tensor:
    """Values of many magnitudes, with zero, tiny and huge blocks and, unless finite, infinities and NaN."""
    x = torch.randn(rows, k) * torch.exp(3 * torch.randn(rows, k))
    for row, factor in ((1, 0.0), (3, 1e-44), (5, 1e34), (7, 1e-38)):
        x[row : row + 1, : k // 2 + 1] *= factor
    x = x.to(dtype).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    if not finite and rows > 12:
        x[9, k // 2], x[10, 0], x[11, -1], x[12, 0] = math.inf, -math.inf, math.nan, -math.nan
    return x
