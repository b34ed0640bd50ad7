"""FP8 casts against those of torch and ml_dtypes bit for bit, all codes both ways, and stochastic rounding."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8_values import DTYPES, E4M3, E5M2, ISAS, codes, each_type, floats, nan_is_no_mistake, same
from lowbit import fp8
from lowbit.backends.cpu import fp8 as cpu
from lowbit.backends.triton import fp8 as triton
from lowbit.float8 import FLOAT8, find_granularity
from lowbit.reference import fp8 as reference


@each_type
@pytest.mark.parametrize("isa", ISAS)
def test_casts_are_those_of_torch_and_ml_dtypes(dtype: torch.dtype, isa: str) -> None:
    x, f = floats(), FLOAT8[dtype]
    assert x.numel() > 1_000_000
    theirs = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}[dtype]
    for saturate in (False, True):
        bounded = x.clamp(-f.max, f.max) if saturate else x
        q = cpu.cast(x, dtype, saturate, isa)
        # Some versions of torch saturate E4M3, others do not.
        same_in_torch = (x.abs() < f.overflow) | x.isnan() | saturate | (dtype == E5M2)
        assert torch.equal(codes(q)[same_in_torch], codes(bounded.to(dtype))[same_in_torch])
        with np.errstate(all="ignore"):
            want = torch.from_numpy(bounded.numpy().astype(theirs).view(np.uint8))
        number = ~q.float().isnan()
        assert torch.equal(number, ~want.view(dtype).float().isnan())
        assert torch.equal(codes(q)[number], want[number])
        assert torch.equal(codes(q) >> 7, want >> 7)  # also of NaN
        for half in DTYPES[1:]:
            every = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
            want = codes(reference.cast(every, dtype, saturate))
            assert torch.equal(codes(cpu.cast(every, dtype, saturate, isa)), want)


@each_type
@nan_is_no_mistake
def test_triton_casts(dtype: torch.dtype) -> None:
    x = floats()[-(2**17) :: 8]
    x = torch.cat((x, floats()[2**20 : 2**20 + 2**16], floats()[-(2**18) - 2**12 : -(2**18)]))
    for saturate in (False, True):
        for t in (x, x.to(torch.bfloat16), x.to(torch.float16)):
            q = triton.cast(t, dtype, saturate)
            assert torch.equal(codes(q), codes(reference.cast(t, dtype, saturate)))


@each_type
@nan_is_no_mistake
def test_all_codes_round_trip(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    q = every.view(dtype)
    values, f = q.float(), FLOAT8[dtype]
    nan = values.isnan()
    assert nan.sum() == {E4M3: 2, E5M2: 6}[dtype]
    want = torch.where(nan, every & 0x80 | 0x7F, every)
    one = torch.ones(())
    for t in DTYPES:
        decoded = fp8.dequantize(q, one, t)
        assert same(decoded, values.to(t))
        assert torch.equal(codes(fp8.cast(decoded, dtype, saturate=False)), want)
        assert torch.equal(
            codes(fp8.cast(decoded, dtype))[values.isfinite()], want[values.isfinite()]
        )
        assert same(triton.dequantize(q[None], one, find_granularity("tensor"), t)[0], decoded)
    # With the scale 1 and with stochastic rounding, which leaves exact values alone.
    finite = values[values.isfinite()]
    for rounding in ("nearest", "stochastic"):
        again, scale = fp8.quantize(finite, dtype, rounding=rounding)
        assert scale == 1
        assert torch.equal(codes(again), every[values.isfinite()])
    assert f.max == finite.max()


@each_type
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """Sums of n independent errors, each with variance step^2 p (1 - p), lie within 3 sigma; so does the number of
    values whose own mean does not.
    """
    f, n = FLOAT8[dtype], 1 << 14
    subnormal = f.min_normal * 2.0**-f.mantissa
    x = torch.cat(
        (
            torch.rand(30) * 8 * subnormal,
            torch.rand(30) * subnormal / 64,
            f.min_normal * torch.exp2(torch.rand(60) * 15),
            f.max * (0.85 + 0.15 * torch.rand(8)),
        )
    ).clamp(max=f.max)
    x = torch.cat((x, -x))
    q = fp8.quantize(x[:, None].expand(-1, n), dtype, "tensor", rounding="stochastic", seed=1,
                     maxima=torch.tensor(f.max))[0].float()  # fmt: skip
    exponent = torch.frexp(x.abs().clamp(min=f.min_normal)).exponent - 1
    step = torch.exp2(exponent.float() - f.mantissa)
    low = (x.abs() / step).floor() * step
    assert ((q.abs() == low[:, None]) | (q.abs() == (low + step)[:, None])).all()
    p = (x.abs() - low) / step
    sigma = step.double() * (p * (1 - p) / n).double().sqrt()
    z = (q.double().mean(1) - x.double()) / sigma.clamp(min=1e-30)
    assert abs(z.sum()) <= 3 * math.sqrt(len(z))
    outside = (z.abs() > 3).double().mean()  # expected: 0.0027
    assert outside <= 0.0027 + 3 * math.sqrt(0.0027 / len(z))
    # Their squares: mean 1, variance about 2.
    assert abs((z**2).mean() - 1) <= 3 * math.sqrt(2 / len(z))


def test_stochastic_rounding_of_a_matrix() -> None:
    """The mean error of a million values, and of neighbours: noise is independent along rows, columns and seeds."""
    x = torch.randn(1024, 1024)
    shifts = []
    for seed in (5, 6, 5 + 2**32):
        q, scale = fp8.quantize(x, rounding="stochastic", seed=seed)
        ratio = x / scale
        shifts.append((q.float() - ratio).double())
    error = shifts[0]
    assert abs(error.mean()) <= 3 * error.std() / 1024
    for a, b in (
        (error[:, 1:], error[:, :-1]),
        (error[1:], error[:-1]),
        (error[:, 16:], error[:, :-16]),
        (shifts[0], shifts[1]),
        (shifts[0], shifts[2]),
    ):
        product = a * b
        assert abs(product.mean()) <= 3 * product.std() / math.sqrt(product.numel())


def test_seeds() -> None:
    x = torch.randn(8, 64)
    a, b = (fp8.quantize(x, rounding="stochastic", seed=9)[0] for _ in range(2))
    assert torch.equal(codes(a), codes(b))
    torch.manual_seed(3)
    first, second = (codes(fp8.quantize(x, rounding="stochastic")[0]) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, codes(fp8.quantize(x, rounding="stochastic")[0]))
    assert not torch.equal(first, second)
    # Of the row and the column alone: a part of the columns is that of the whole.
    scale = torch.tensor(448.0)
    part = fp8.quantize(x[:, :10], rounding="stochastic", seed=9, maxima=scale)[0]
    whole = fp8.quantize(x, rounding="stochastic", seed=9, maxima=scale)[0]
    assert torch.equal(codes(part), codes(whole[:, :10]))
