"""LLM.int8(): outlier features apart from int8 products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import reference
from lowbit.nn import LLMInt8Linear, QuantLinear

FORMAT = "int8_row_a8"
PLANTED = [3, 100, 200]


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(256, 96)


@pytest.fixture
def x() -> torch.Tensor:
    """Features of a few times 60 among features of about 1."""
    x = torch.randn(32, 256)
    x[:, PLANTED] = 60 + x[:, PLANTED].abs() * 20
    return x


def error(layer: nn.Module, linear: nn.Linear, x: torch.Tensor) -> float:
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    return float((layer(x).double() - exact).norm() / exact.norm())


def test_planted_outliers_cost_ten_times_less(linear: nn.Linear, x: torch.Tensor) -> None:
    plain = QuantLinear.from_linear(linear, FORMAT)
    split = LLMInt8Linear.from_linear(linear, absmax=x.abs().amax(0))
    with torch.no_grad():
        assert split.features.tolist() == PLANTED
        assert error(split, linear, x) < error(plain, linear, x) / 10


def test_the_parts_of_a_fixed_split(linear: nn.Linear, x: torch.Tensor) -> None:
    layer = LLMInt8Linear.from_linear(linear, absmax=x.abs().amax(0))
    assert torch.equal(layer.columns, linear.weight[:, PLANTED])
    rest = linear.weight.detach().index_fill(1, torch.tensor(PLANTED), 0)
    qt = lowbit.quantize(rest, FORMAT)
    assert torch.equal(layer.quantized.quant_tensor().codes, qt.codes)
    small = x.index_fill(1, torch.tensor(PLANTED), 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = lowbit.linear(small.to(dtype), qt, linear.bias)
        expected = expected + x[:, PLANTED].to(dtype) @ linear.weight[:, PLANTED].to(dtype).T
        assert torch.equal(layer(x.to(dtype)), expected)


def test_outliers_of_a_call(linear: nn.Linear, x: torch.Tensor) -> None:
    """They change with x, and are multiplied with the quantized weight in full precision."""
    layer = LLMInt8Linear.from_linear(linear)
    qt = lowbit.quantize(linear.weight.detach(), FORMAT)
    quiet, loud = torch.randn(4, 256).clamp(-3, 3), x[:5]
    assert torch.equal(layer(quiet), lowbit.linear(quiet, qt, linear.bias))
    mask = torch.zeros(256, dtype=torch.bool).index_fill(0, torch.tensor(PLANTED), True)
    small = torch.where(mask, 0, loud)
    exact = (loud * mask).double() @ qt.dequantize().double().T
    expected = reference.linear(small, qt, linear.bias).double() + exact
    torch.testing.assert_close(layer(loud).double(), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        # What is left is the error of the weight in int8.
        dense = error(nn.Linear(256, 96).requires_grad_(False), linear, x)
        quantized = copy.deepcopy(linear)
        quantized.weight.copy_(qt.dequantize())
        assert error(layer, linear, x) < 1.1 * error(quantized, linear, x) < dense


def test_the_threshold_itself_is_no_outlier(linear: nn.Linear) -> None:
    absmax = torch.zeros(256)
    absmax[7], absmax[9] = 6.0, 6.5
    assert LLMInt8Linear.from_linear(linear, absmax=absmax).features.tolist() == [9]
    one = LLMInt8Linear.from_linear(linear, absmax=absmax, threshold=5.0)
    assert one.features.tolist() == [7, 9]


def test_no_and_only_outliers(linear: nn.Linear) -> None:
    x = torch.randn(3, 256)
    none = LLMInt8Linear.from_linear(linear, absmax=torch.ones(256))
    assert torch.equal(none(x), QuantLinear.from_linear(linear, FORMAT)(x))
    every = LLMInt8Linear.from_linear(linear, absmax=torch.full((256,), 7.0))
    torch.testing.assert_close(every(x), linear(x))


@pytest.mark.parametrize("calibrated", (True, False))
def test_gradients_state_and_compile(calibrated: bool, linear: nn.Linear, x: torch.Tensor) -> None:
    absmax = x.abs().amax(0) if calibrated else None
    layer = LLMInt8Linear.from_linear(linear, absmax=absmax)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    leaf = x[:4].clone().requires_grad_()
    layer(leaf).sum().backward()
    weight = layer.quantized.quant_tensor().dequantize()
    if calibrated:
        weight[:, PLANTED] = layer.columns
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(4, 256), rtol=1e-4, atol=1e-5)
    other = copy.deepcopy(layer)
    for t in (other.columns,) if calibrated else ():
        t.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert "outlier features: " + ("3" if calibrated else "found in every call") in repr(layer)


def test_models(x: torch.Tensor, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(256, 96), nn.Tanh(), nn.Linear(96, 8), nn.Embedding(5, 3))
    body = model[:3]
    dense = copy.deepcopy(body)
    plain = copy.deepcopy(body)
    lowbit.quantize_model(plain, FORMAT, progress=False)
    found = copy.deepcopy(body)
    report = lowbit.quantize_llm_int8(body, calibration=[x], progress=False)
    assert body[0].features.tolist() == PLANTED
    assert body[2].features.tolist() == []
    qt = body[0].quantized.quant_tensor()
    assert report.layers[0].nbytes == qt.nbytes + 3 * 8 + 96 * 3 * 4
    lowbit.quantize_llm_int8(found, {"0": FORMAT}, progress=False)
    assert isinstance(found[0], LLMInt8Linear)
    assert type(found[2]) is nn.Linear
    with torch.no_grad():
        y = dense(x)
        assert (body(x) - y).norm() < (plain(x) - y).norm() / 5
        file = lowbit.save(body, tmp_path)
        again = copy.deepcopy(body)
        again[0].columns.zero_()
        assert torch.equal(lowbit.load(again, file)(x), body(x))


def test_bad_input(linear: nn.Linear) -> None:
    with pytest.raises(ValueError, match="format must have int8 activations .* 'int8_row'"):
        LLMInt8Linear.from_linear(linear, "int8_row")
    for threshold in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="threshold must be positive and finite"):
            LLMInt8Linear.from_linear(linear, threshold=threshold)
    for absmax in (torch.ones(5), torch.full((256,), float("nan"))):
        with pytest.raises(ValueError, match=r"absmax must be finite of shape \(256,\)"):
            LLMInt8Linear.from_linear(linear, absmax=absmax)
    with pytest.raises(TypeError, match="linear must be an nn.Linear"):
        LLMInt8Linear.from_linear(nn.ReLU())
    quantized = QuantLinear.from_linear(linear, FORMAT)
    features = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="together"):
        LLMInt8Linear(quantized, 6.0, features)
    with pytest.raises(ValueError, match="features must be int64"):
        LLMInt8Linear(quantized, 6.0, features.int(), torch.zeros(96, 2))
    with pytest.raises(ValueError, match=r"columns must be floating of shape \(96, 2\)"):
        LLMInt8Linear(quantized, 6.0, features, torch.zeros(96, 3))
    with pytest.raises(TypeError, match="quantized must be a QuantLinear"):
        LLMInt8Linear(linear)
    with pytest.raises(ValueError, match="calibration is empty"):
        lowbit.quantize_llm_int8(nn.Sequential(linear), calibration=[], progress=False)
    with pytest.raises(ValueError, match="0: format must have int8 activations"):
        lowbit.quantize_llm_int8(nn.Sequential(linear), "int4", progress=False)


def test_outliers_are_found_by_magnitude(linear: nn.Linear) -> None:
    """Found in every call: the layer without its bias is odd, so outliers of either sign count."""
    plain = nn.Linear(256, 96, bias=False)
    layer = LLMInt8Linear.from_linear(plain)
    x = torch.randn(7, 256)
    x[:, PLANTED] = -70.0
    with torch.no_grad():
        assert torch.equal(layer(-x), -layer(x))
        exact = plain(x)
        assert (layer(x) - exact).norm() < 0.02 * exact.norm()
