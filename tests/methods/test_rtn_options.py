"""Options of round to nearest: ranges, granularity, clipping and rounding, against formulas written out again."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_codes_are_best, normal

import lowbit
from lowbit.explanation import REFERENCE
from lowbit.formats import Format
from lowbit.methods import clipping, quantize

FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)


@pytest.fixture
def _short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_FACTORS", FACTORS)


def relative_error(weight: torch.Tensor, **arguments) -> float:
    made = quantize(weight, method="rtn", **arguments).dequantize()
    return float((made - weight).double().square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_uniform_weights_err_by_the_noise_of_a_step(bits: int):
    """D^2 / 12 for nearest, and D^2 / 3 for floor, whose error is uniform over [0, D)."""
    weight = torch.linspace(-1, 1, 1 << 16).view(1, -1)
    for rounding, share in (("nearest", 12), ("floor", 3)):
        qt = quantize(
            weight, f"int{bits}_row_fp32", symmetric_range="restricted", rounding=rounding
        )
        error = (qt.dequantize() - weight).double().square().mean()
        # The sample of 2^16 points resolves a step of 2^-7 by 2^8 of them.
        assert math.isclose(error, float(qt.scales) ** 2 / share, rel_tol=0.01)


def test_int4_in_blocks_of_64_of_a_normal_weight():
    """0.0116 for +-7 steps of absmax / 7: 2^18 weights, so the estimate itself errs by 0.3 %."""
    weight = normal(256, 1024)
    error = relative_error(weight, format="int4_g64_fp32", symmetric_range="restricted")
    assert math.isclose(error, 0.0116, rel_tol=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_ranges(bits: int):
    weight = normal(3, 150)
    absmax = weight[:, :64].abs().amax(1).double().numpy()
    for name, divisor in (("balanced", 0.5), ("full", 0.0), ("restricted", 1.0)):
        qt = quantize(weight, f"int{bits}_g64_fp32", symmetric_range=name)
        wanted = (absmax / (2 ** (bits - 1) - divisor)).astype(np.float32)
        np.testing.assert_array_equal(qt.scales[:, 0].numpy(), wanted)
        if name != "restricted":
            assert_codes_are_best(qt, weight)
        q = qt.unpack().int() - 2 ** (bits - 1)
        assert q.min() >= (1 - 2 ** (bits - 1) if name == "restricted" else -(2 ** (bits - 1)))
    top = torch.tensor([[-2.0, 1.0, 2.0]])
    for sign in (1, -1):
        full = quantize(sign * top, "int3_row_fp32", symmetric_range="full")
        assert full.dequantize().tolist() == ([[-2, 1, 1.5]] if sign > 0 else [[1.5, -1, -2]])


@pytest.mark.parametrize(
    "name", ["int4_g64", "uint4_g64", "q4_1_g64", "nf4_g64", "ternary_g64", "uint8_zfloat_g64"]
)
def test_one_scale_for_the_tensor(name: str):
    """What a single row of all weights has; the last groups are short."""
    weight = normal(5, 150) + 0.3
    qt = quantize(weight, name, granularity="tensor").validate()
    whole = quantize(weight.view(1, -1), name.replace("g64", "row"))
    assert torch.equal(qt.scales, whole.scales.expand_as(qt.scales))
    assert qt.zeros is None or torch.equal(qt.zeros, whole.zeros.expand_as(qt.zeros))
    assert torch.equal(qt.dequantize(), whole.dequantize().view_as(weight))
    rms = Format.lut(bits=2, table=(-1.5, -0.5, 0.5, 1.5), scale_rule="rms", scale="fp32")
    scales = quantize(weight, rms, granularity="tensor").scales
    torch.testing.assert_close(scales, weight.square().mean().sqrt().expand_as(scales))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_asymmetric_tensors_are_those_of_torch():
    from torch.ao.quantization import MinMaxObserver

    for weight in (normal(7, 90) + 0.5, normal(7, 90).abs() + 1):
        observer = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        observer(weight)
        scale, zero = observer.calculate_qparams()
        qt = quantize(weight, "uint8_row_fp32", granularity="tensor")
        # torch divides in fp32, here it is fp64 rounded once.
        torch.testing.assert_close(qt.scales[0], scale, rtol=2**-22, atol=0)
        assert (qt.zeros == zero.to(torch.uint8)).all()


def test_stochastic_rounding_is_unbiased_and_repeatable():
    weight = normal(4, 4096)
    options = {"symmetric_range": "restricted", "rounding": "stochastic"}
    qt = quantize(weight, "int4_row_fp32", seed=3, **options)
    ratio = weight.double() / qt.scales.double()
    q = qt.unpack().double() - 8
    # A ratio is rounded to fp32: next to an integer the fraction may be off by that.
    assert ((q == ratio.floor()) | (q == ratio.ceil()) | ((ratio - q).abs() < 2**-20)).all()
    fraction = ratio - ratio.floor()
    sigma = (fraction * (1 - fraction)).sum(1).sqrt()
    assert ((q - ratio).sum(1).abs() <= 3 * sigma).all()
    again, other = (quantize(weight, "int4_row_fp32", seed=s, **options) for s in (3, 4))
    assert torch.equal(again.unpack(), qt.unpack())
    assert not torch.equal(other.unpack(), qt.unpack())
    with_zero = quantize(weight, "uint4_zfloat_row", rounding="stochastic").validate()
    assert (with_zero.dequantize() - weight).abs().max() <= 1.01 * with_zero.scales.max()


def test_floor():
    weight = normal(3, 100)
    qt = quantize(weight, "int5_g20_fp32", rounding="floor")
    ratio = weight.numpy() / qt.scales.numpy().repeat(20, axis=1)
    np.testing.assert_array_equal(qt.unpack().numpy(), np.floor(ratio).clip(-16, 15) + 16)


def test_the_grid_has_90_steps_of_a_percent():
    low, high = torch.tensor([-3.0, -2.0, 0.0]).double(), torch.tensor([4.0, 2.0, 8.0]).double()
    wanted = torch.tensor([1.0, 0.37, 0.11]).double()
    seen = []

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        seen.append(high / torch.tensor([4.0, 2.0, 8.0]))
        return (high - wanted * torch.tensor([4.0, 2.0, 8.0])).abs()

    got = clipping.least_error(low, high, error)
    torch.testing.assert_close(torch.stack(got), torch.stack([low * wanted, high * wanted]))
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.linspace(1, 0.11, 90).double())
    flat = clipping.least_error(low, high, lambda low, high: torch.zeros_like(low))
    assert torch.equal(torch.stack(flat), torch.stack([low, high])), "of equals the widest wins"


def least_errors(rows: torch.Tensor, format: Format) -> torch.Tensor:
    """The least squared error of each row, a group, over the grid. Clamped to a range a group has just
    that range, so rounding it is the oracle.
    """
    by_row = dataclasses.replace(format, name="by row", group=None)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if format.scale_rule == "absmax":
        high = torch.maximum(-low, high)
        low = -high
    errors = [
        (quantize(rows.clamp(f * low, f * high), by_row).dequantize() - rows).square().sum(1)
        for f in FACTORS
    ]
    return torch.stack(errors).amin(0)


@pytest.mark.usefixtures("_short_grid")
@pytest.mark.parametrize("name", ["int3_g50_fp32", "uint3_g50_fp32", "nf3_g50_fp32", "mxfp4_g50"])
def test_mse_clipping_takes_the_best_of_the_grid(name: str):
    weight = normal(2, 120) ** 3
    qt = quantize(weight, name, clipping="mse").validate()
    square = (qt.dequantize() - weight).square()
    for got, group in (
        (square[:, :100].reshape(4, 50), weight[:, :100].reshape(4, 50)),
        (square[:, 100:], weight[:, 100:]),
    ):
        # The clamped range is rounded to fp32: a code next to a boundary may differ.
        assert (got.sum(1) <= least_errors(group, qt.format) * (1 + 1e-4)).all()
    whole = quantize(weight, name, clipping="mse", granularity="tensor").dequantize()
    least = least_errors(weight.view(1, -1), qt.format)
    assert (whole - weight).square().sum() <= least * (1 + 1e-4)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_quantile_is_that_of_numpy(values: list[float], fraction: float):
    got = float(clipping.quantile(torch.tensor(values), fraction))
    wanted = np.quantile(np.array(values), fraction)
    # The position, a product, may round the other way.
    assert math.isclose(got, wanted, rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_percentile_clipping(granularity: str):
    weight = normal(3, 200)
    groups = weight.view(3, 2, 100) if granularity == "group" else weight.view(1, 1, 600)
    qt = quantize(
        weight, "int4_g100_fp32", clipping="percentile", percentile=0.97, granularity=granularity
    )
    wanted = np.quantile(groups.abs().numpy(), 0.97, axis=2) / 7.5
    np.testing.assert_allclose(qt.scales.numpy(), np.broadcast_to(wanted, (3, 2)), rtol=1e-6)
    qt = quantize(
        weight, "q4_1_g100_fp32", clipping="percentile", percentile=0.97, granularity=granularity
    )
    low, high = np.quantile(groups.numpy(), [0.03, 0.97], axis=2)
    wanted = np.broadcast_to((high - low) / 15, (3, 2))
    np.testing.assert_allclose(qt.scales.numpy(), wanted, rtol=1e-6)
    np.testing.assert_allclose(qt.zeros.numpy(), np.broadcast_to(low, (3, 2)), rtol=1e-6)
    default = quantize(weight, "int4_row_fp32", clipping="percentile").scales
    wanted = np.quantile(weight.abs().numpy(), 0.99999, axis=1, keepdims=True) / 7.5
    np.testing.assert_allclose(default.numpy(), wanted, rtol=1e-6)


def divergence(counts: np.ndarray, i: int, levels: int) -> float:
    """KL(P || Q) of the first i bins as the slides put it, with loops and scipy's entropy."""
    p = counts[:i].astype(np.float64)
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    for level in range(levels):
        run = slice(level * i // levels, (level + 1) * i // levels)
        used = p[run] > 0
        if used.any():
            q[run][used] = counts[:i][run].sum() / used.sum()
    return float(scipy.stats.entropy(p, q)) if q.sum() else math.inf


@given(st.lists(st.integers(0, 40), min_size=6, max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_entropy_threshold(counts: list[int], levels: int):
    counts[0] += 1
    kept = clipping.entropy_threshold(torch.tensor(counts), levels)
    array = np.array(counts)
    every = {i: divergence(array, i, levels) for i in range(levels, len(counts) + 1)}
    # Sums of 40 terms of a few nats in fp64.
    assert every[kept] <= min(every.values()) + 1e-12


def test_of_equal_thresholds_the_largest_wins():
    assert clipping.entropy_threshold(torch.tensor([5, 0, 0, 0]), 1) == 4
    assert clipping.entropy_threshold(torch.tensor([5, 3]), 4) == 2


def test_kl_clipping():
    weight = normal(2, 6000)
    weight[:, 0] = 60.0
    for name, granularity in (("int8_row_fp32", "group"), ("int8_g50_fp32", "tensor")):
        qt = quantize(weight, name, clipping="kl", granularity=granularity)
        counts = np.stack([np.histogram(w.abs(), 2048, (0, 60))[0] for w in weight])
        counts = counts if granularity == "group" else counts.sum(0, keepdims=True)
        kept = [clipping.entropy_threshold(torch.from_numpy(c), 128) for c in counts]
        wanted = torch.tensor(kept, dtype=torch.float64) * 60 / 2048 / 127.5
        wanted = wanted.float().view(-1, 1).expand_as(qt.scales)
        torch.testing.assert_close(qt.scales, wanted, rtol=2**-22, atol=0)
        assert float(qt.scales.max()) < 20 / 127.5, "the outlier is cut off"
    shifted = quantize(weight, "uint8_row_fp32", clipping="kl")
    assert float(shifted.scales.max()) < 30 / 255


@pytest.mark.usefixtures("_short_grid")
def test_ranges_without_spread():
    """All zero, constant and a single weight."""
    for weight in (torch.zeros(2, 100), torch.full((2, 100), -3.0), torch.full((1, 1), 2.0)):
        for name, how in itertools.product(
            ("int4_row_fp32", "uint4_row_fp32", "q4_1_row_fp32"), ("percentile", "mse", "kl")
        ):
            qt = quantize(weight, name, clipping=how, granularity="tensor")
            error = (qt.validate().dequantize() - weight).abs().max()
            assert error <= 0.5 * float(qt.scales.max()) * (1 + 1e-6)


BAD = [
    ("int4", {"granularity": "row"}, "granularity must be one of .* got 'row'"),
    ("int4", {"symmetric_range": "x"}, "symmetric_range must be one of .* got 'x'"),
    ("int4", {"clipping": "x"}, "clipping must be one of .* got 'x'"),
    ("int4", {"rounding": "x"}, "rounding must be one of .* got 'x'"),
    ("uint4", {"symmetric_range": "full"}, "'full' is for integers without a zero"),
    ("nf4", {"symmetric_range": "full"}, "'full' is for integers"),
    ("nf4", {"rounding": "floor"}, "rounding 'floor' is for integers, format 'nf4'"),
    ("nf4_row", {"clipping": "kl"}, "clipping 'kl' is for integers"),
    ("int4", {"clipping": "kl"}, "'kl' needs a histogram of a row or of the weight"),
    ("binary", {"clipping": "mse"}, "for scales by absmax or minmax, format 'binary' has 'mean'"),
    ("int4", {"percentile": 0.9}, "percentile is for clipping 'percentile', got 'minmax'"),
    ("int4", {"clipping": "percentile", "percentile": 0.5}, "percentile must be above 0.5"),
    (Format.lut(bits=1, table=(-1, 1), scale=None), {"clipping": "mse"}, "needs scales"),
    ("kmeans4", {"clipping": "mse", "table": torch.ones(16)}, "has a fitted table"),
    (Format.lut(bits=1, table=(-1, 1), scale=None), {"granularity": "tensor"}, "needs scales"),
]


@pytest.mark.parametrize(("format", "options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(format, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(normal(2, 300), format, "rtn", **options)


@pytest.mark.usefixtures("_short_grid")
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_the_kernels_run_it(clip: str):
    weight = normal(48, 256)
    qt = quantize(weight, "int4", clipping=clip, granularity="tensor", rounding="stochastic")
    eye = torch.eye(256)
    assert torch.equal(lowbit.linear(eye, qt).T, qt.dequantize())
    assert lowbit.explain(eye, qt).selected != REFERENCE
