"""Integers of the two schemes: against real numbers within half a step, Python's integers, and errors before a run."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import integer_models
import pytest
import torch
from torch import Tensor, nn

from lowbit.integer import Graph, IntegerGraph, calibrate, quantize_qmn, quantize_tflite, trace
from lowbit.integer.qmn import fraction_bits
from lowbit.integer.rescaling import divide, power_of_two

pytestmark = pytest.mark.usefixtures("one_thread")


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    return trace(integer_models.program_of(model, x))


def quantized(scheme: str, graph: Graph, ranges: Any, **setting: Any) -> IntegerGraph:
    make = quantize_tflite if scheme == "tflite" else quantize_qmn
    return make(graph, ranges, **setting)


def test_fraction_bits() -> None:
    """bits - 1 - (floor(log2 max) + 1), as the paper has it, for powers of two too."""
    for largest in (0.3, 0.5, 0.999, 1.0, 1.5, 2.0, 100.0, 2.0**-9):
        for bits in (8, 16):
            assert fraction_bits(largest, bits) == bits - 1 - (math.floor(math.log2(largest)) + 1)
    assert fraction_bits(0.0, 8) == 7


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_shifts_and_divisions(rounding: str) -> None:
    """Python's fractions: floor, and nearest with ties up, of both signs."""
    sums = torch.arange(-40, 41)
    half = Fraction(1, 2) if rounding == "nearest" else 0
    for shift in (-3, 0, 1, 4):
        got = power_of_two(torch.tensor([shift]), rounding, "a").apply(sums, 0).tolist()
        assert got == [
            math.floor(Fraction(s) / Fraction(2) ** shift + half) for s in range(-40, 41)
        ]
    for count in (1, 3, 4):
        got = divide(sums, torch.tensor(count), rounding).tolist()
        assert got == [math.floor(Fraction(s, count) + half) for s in range(-40, 41)]
    away = divide(sums, torch.tensor(4), "away").tolist()
    assert away == [int(math.copysign(math.floor(abs(s) / 4 + 0.5), s)) for s in range(-40, 41)]


@pytest.mark.parametrize("codebook", [None, 4])
@pytest.mark.parametrize(
    ("scheme", "setting"),
    [
        ("qmn", {"bits": 8}),
        ("qmn", {"bits": 16, "granularity": "filter"}),
        ("qmn", {"bits": 8, "granularity": "filter", "rounding": "floor"}),
        ("tflite", {}),
    ],
    ids=str,
)
def test_a_layer_is_the_real_one(
    scheme: str, setting: dict[str, Any], codebook: int | None
) -> None:
    """With the real numbers that the integers stand for, results differ by rounding alone: below a step for floor,
    half a step for nearest, and 2^-7 for gemmlowp's rounding of the product before a shift of 7 or more.
    """
    conv = nn.Conv2d(3, 5, 3, padding=1, groups=1)
    x = torch.randn(32, 3, 6, 5) + 0.4
    graph = graph_of(conv, x)
    integers = quantized(scheme, graph, calibrate(graph, x), codebook=codebook, **setting)
    (n,) = integers.nodes
    assert n.weight is not None
    assert n.bias is not None
    grid, q = integers.input_grid, integers.quantize(x)
    steps = conv.weight.detach().double().flatten(1)
    if n.codebook is not None:
        assert n.weight.unique().numel() <= 16
    # The step of the weight, from the factor of the sums: it is step * input step / output step.
    rescale = n.rescales[0]
    shift = torch.exp2(-rescale.shift.double())
    factor = shift if rescale.multiplier is None else rescale.multiplier * shift / 2**31
    weight_step = (factor * n.grid.scale / grid.scale).expand(5)
    weight = n.weight * weight_step.reshape(-1, 1, 1, 1)
    if n.codebook is None:
        assert ((weight.flatten(1) - steps).abs() <= weight_step[:, None] * 1.0001).all()
    bias = (n.bias + grid.zero * n.weight.flatten(1).sum(1)) * weight_step * grid.scale
    real = nn.functional.conv2d(grid.dequantize(q), weight, bias, padding=1)
    expected = (real / n.grid.scale + n.grid.zero).clamp(n.grid.least, n.grid.most)
    got = integers.run(q)[n.node.name]
    error = got - expected
    if setting.get("rounding") == "floor":
        assert error.max() <= 1e-9
        assert error.min() > -1
    else:
        assert error.abs().max() <= (0.5 + 2**-7 if scheme == "tflite" else 0.5 + 1e-9)


def test_relu_and_zero_points() -> None:
    """Zero is an integer of every grid of TFLite's, and a ReLU ends there; a range without 0 is widened."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(50, 4) + 3
    graph = graph_of(model, x)
    integers = quantize_tflite(graph, calibrate(graph, x))
    assert integers.input_grid.zero == -128
    assert integers.nodes[0].low == integers.nodes[0].grid.zero == -128
    assert float(integers.input_grid.dequantize(torch.tensor(-128))) == 0
    error = (integers(x) - graph(x)).abs().max()
    # Three roundings of half a step, through weights of sum below 3.
    assert error < 6 * max(grid.scale for grid in integers.grids.values())


def test_sixteen_bits_leave_room_for_sums() -> None:
    """A layer's sums fit int32 for every input, at the cost of bits of the weight; Q7.9 is an error instead."""
    linear = nn.Linear(4096, 2)
    nn.init.constant_(linear.weight, 0.99)
    x = torch.rand(4, 4096) / 64
    graph = graph_of(linear, x)
    ranges = calibrate(graph, x)
    for granularity in ("layer", "filter"):
        (n,) = quantize_qmn(graph, ranges, bits=16, granularity=granularity).nodes
        assert n.weight is not None
        assert n.bias is not None
        assert int((n.weight.abs().sum(1) * 2**15 + n.bias.abs()).max()) < 2**31
    message = r"the model \(linear\): sums may reach \d+, which overflows int32 \(2147483647\)"
    with pytest.raises(ValueError, match=message):
        quantize_qmn(graph, ranges, bits=16)


def test_what_calibration_refuses() -> None:
    graph = graph_of(nn.Linear(4, 2), torch.randn(2, 4))
    for bad, error, message in (
        (torch.zeros(3, 5), ValueError, r"must have shape \(samples, 4\), got \(3, 5\)"),
        (torch.zeros(0, 4), ValueError, r"must have shape \(samples, 4\), got \(0, 4\)"),
        (torch.zeros(3, 4, dtype=torch.int8), TypeError, "must be a tensor of floating point"),
        (torch.tensor([[0.0] * 4, [0, math.nan, 0, 0]]), ValueError, "sample 1 has NaN"),
        (torch.tensor([[0, math.inf, 0, 0]]), ValueError, "sample 0 has NaN or infinity"),
    ):
        with pytest.raises(error, match=message):
            calibrate(graph, bad)


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    x = torch.randn(3, 4)
    graph = graph_of(model, x)
    ranges = calibrate(graph, x)
    for scheme in ("qmn", "tflite"):
        with pytest.raises(ValueError, match=r"0 \(linear\): tensor 'linear' is not calibrated"):
            quantized(scheme, graph, {"input": (0.0, 1.0)})
        with pytest.raises(ValueError, match="the input: tensor 'input' is not calibrated"):
            quantized(scheme, graph, {"linear": (0.0, 1.0)})
    with pytest.raises(ValueError, match="granularity must be one of"):
        quantize_qmn(graph, ranges, granularity="row")
    with pytest.raises(ValueError, match="rounding must be one of"):
        quantize_qmn(graph, ranges, rounding="up")
    with pytest.raises(ValueError, match="fraction is for granularity 'network', got 3"):
        quantize_qmn(graph, ranges, fraction=3)
    with pytest.raises(ValueError, match="fraction must be 0 to 30, got 31"):
        quantize_qmn(graph, ranges, granularity="network", fraction=31)
    integers = quantize_qmn(graph, ranges)
    with pytest.raises(ValueError, match="x must be finite"):
        integers(torch.full((1, 4), math.nan))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, \(4,\)\), got \(2, 5\)"):
        integers(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="q must be torch.int8 of shape"):
        integers.run(torch.zeros(2, 4))
