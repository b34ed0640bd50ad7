"""Packed convolutions: against torch's with the dequantized weight, in models, and on their way to files and back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.nn import (
    QuantConv,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)

KINDS = [
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
]
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3": {"kernel_size": 3},
    "3, strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2, dilated": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "1": {"kernel_size": 1},
    "1, strided": {"kernel_size": 1, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 3, "padding": 2},
    "depthwise": {"kernel_size": 3, "groups": 6, "padding": 1},
    "depthwise, strided": {"kernel_size": 5, "groups": 6, "padding": 2, "stride": 2},
    "all": {"kernel_size": 2, "stride": 3, "dilation": 2, "padding": 1, "groups": 2},
}
ONLY_FORWARD: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
}
ONLY_TRANSPOSED: dict[str, dict[str, Any]] = {
    "output_padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "output_padding, groups": {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2},
}
SIZES = (7, 6, 5)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def cases() -> list[Any]:
    return [
        pytest.param(kind, kwargs, id=f"{kind.__name__} {name}")
        for kind in KINDS
        for name, kwargs in {
            **GEOMETRIES,
            **(ONLY_TRANSPOSED if kind.transposed else ONLY_FORWARD),
        }.items()
    ]


def made(kind: type[QuantConv], kwargs: dict[str, Any], format: str = "nf4_g16_fp32") -> QuantConv:
    torch.manual_seed(3)
    return kind.from_conv(kind.kind(6, 12, **kwargs), format)


def dense_result(layer: QuantConv, x: Tensor) -> Tensor:
    """By torch, in fp64, with the values that the weight stands for."""
    dense = copy.deepcopy(layer.to_conv(torch.float32)).double()
    with torch.no_grad():
        return dense(x.double())


def close(y: Tensor, expected: Tensor, tolerance: float) -> None:
    """Sums of hundreds of products: an error relative to the largest of them."""
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "kwargs"), cases())
def test_it_computes_what_torch_does(
    kind: type[QuantConv], kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = made(kind, kwargs)
    x = torch.randn(2, 6, *SIZES[: kind.dims]).to(dtype)
    expected = dense_result(layer, x)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == dtype
        assert y.is_contiguous()
        close(y, expected, DTYPES[dtype])
        single = layer(x[1])
        assert torch.equal(single, layer(x[1:])[0])
        last = layer(x.movedim(1, -1).contiguous().movedim(-1, 1))
    # With groups torch's own products add in another order.
    close(last, expected, DTYPES[dtype])
    assert last.stride(1) == 1 or last.is_contiguous()


@pytest.mark.parametrize(("kind", "kwargs"), cases())
def test_x_has_gradients(kind: type[QuantConv], kwargs: dict[str, Any]) -> None:
    layer = made(kind, kwargs)
    dense = layer.to_conv()
    x = torch.randn(2, 6, *SIZES[: kind.dims])
    gradients = []
    for each in (layer, dense):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    close(gradients[0], gradients[1].double(), 1e-4)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", [QuantConv2d, QuantConvTranspose2d])
def test_tables_learn(kind: type[QuantConv], groups: int) -> None:
    layer = made(kind, {"kernel_size": 3, "groups": groups}, "kmeans2_pr")
    table, bias = layer.train_parameters(["table", "bias"])
    x = torch.randn(2, 6, 5, 5)
    before = layer(x)
    before.square().sum().backward()
    assert bias.grad.abs().sum() > 0
    # A small step along the gradient moves the loss by what the gradient says.
    step = 1e-4 / table.grad.norm().item()
    with torch.no_grad():
        table -= step * table.grad
        after = layer(x)
    moved = (after.double().square() - before.detach().double().square()).sum()
    torch.testing.assert_close(
        moved.item(), -step * table.grad.square().sum().item(), rtol=0.05, atol=1e-3
    )


@pytest.mark.parametrize("format", ["int8_a8", "int4_g16_a8", "nf4_row_a8t"])
def test_int8_activations_are_those_of_the_patches(format: str) -> None:
    layer = made(QuantConv2d, {"kernel_size": 3, "padding": 1, "stride": 2}, format)
    x = torch.randn(2, 6, 7, 6)
    with torch.no_grad():
        y = layer(x)
        rows = lowbit.linear(layer.rows(x), layer.quant_tensor(), layer.bias).squeeze(-2)
    assert torch.equal(y, rows.movedim(-1, 1))
    close(y, dense_result(layer, x), 0.05)


def test_static_scale() -> None:
    layer = made(QuantConv2d, {"kernel_size": 3, "padding": 1}, "int8_a8")
    layer.set_input_scale(0.02)
    x = torch.randn(2, 6, 7, 6)
    x[1, 2, 3, 3] = float("nan")
    with torch.no_grad():
        y = layer(x)
        single = lowbit.int8.static_linear(
            layer.rows(x).squeeze(-2), torch.tensor(0.02), layer.quant_tensor(), layer.bias
        )
    torch.testing.assert_close(y, single.movedim(-1, 1), rtol=0, atol=0, equal_nan=True)
    assert y[1].isnan().any(0).sum() == 9


@pytest.mark.parametrize("format", ["nf4_o4", "int4_g16_fp32"])
def test_a_pointwise_convolution_of_the_identity_gives_the_weight(format: str) -> None:
    layer = QuantConv2d.from_conv(nn.Conv2d(40, 70, 1, bias=False), format)
    x = torch.eye(40).view(1, 40, 40, 1)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0, :, :, 0], layer.quant_tensor().dequantize())


class Net(nn.Module):
    """Convolutions of all sorts and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x (B, 3, 8, 8)."""
        x = F.relu(self.depthwise(self.stem(x)))
        return self.head(self.up(self.point(x)).flatten(1))


def test_models_are_quantized_saved_loaded_and_made_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    report = lowbit.quantize_model(model, "int8_a8", skip=["head"], progress=False)
    kinds = [type(m).__name__ for m in model.children()]
    assert kinds == ["QuantConv2d"] * 3 + ["QuantConvTranspose2d", "Linear"]
    assert report.left == {"head": "skipped"}
    notes = {row.name: row.note for row in report.layers if row.note}
    assert notes == {"depthwise": "with groups of channels: activations stay as they are"}
    assert model.depthwise.format.activation is None
    with torch.no_grad():
        y = model(x)
    lowbit.save(model, tmp_path / "net.safetensors")
    other = lowbit.load(Net().eval(), tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(other(x), y)
    alike = Net().eval()
    lowbit.quantize_model(alike, "int8_a8", skip=["head"], progress=False)
    alike.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(alike(x), y)
    assert lowbit.dequantize_model(model) == ["stem", "depthwise", "point", "up"]
    assert type(model.stem) is nn.Conv2d
    assert model.stem.weight.shape == (8, 3, 3, 3)
    with torch.no_grad():
        close(model(x), y.double(), 0.05)


def test_methods_learn_from_patches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    for method, format in (("gptq", "int3_g16_fp32"), ("kmeans", "kmeans3_row")):
        model = Net().eval()
        report = lowbit.quantize_model(
            model, format, method=method, calibration=batches, progress=False
        )
        notes = {row.name: row.note for row in report.layers if row.note}
        assert notes == {"depthwise": "with groups of channels: quantized without calibration"}
        assert {row.name for row in report.layers} == {"stem", "depthwise", "point", "up", "head"}
    # GPTQ makes the error of the outputs smaller than rounding does.
    torch.manual_seed(1)
    dense = nn.Conv2d(4, 16, 3, bias=False)
    base = torch.randn(1, 4, 24, 24)
    x = F.avg_pool2d(base, 5, 1, 2)
    errors = {}
    for method in (None, "gptq"):
        model = nn.Sequential(nn.Conv2d(4, 16, 3, bias=False))
        model.load_state_dict({"0.weight": dense.weight})
        given = {} if method is None else {"calibration": [x]}
        lowbit.quantize_model(model, "int3_row", method=method, progress=False, **given)
        with torch.no_grad():
            errors[method] = (model(x) - dense(x)).norm().item()
    assert errors["gptq"] < 0.8 * errors[None]


def test_observers_make_scales_static() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    lowbit.quantize_model(
        model, "int8_a8", skip=["head"], observer="minmax", calibration=[x], progress=False
    )
    assert model.stem.input_scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert model.point.input_scale is not None
    assert model.depthwise.input_scale is None


def test_what_is_wrong_is_named() -> None:
    layer = QuantConv2d.from_conv(nn.Conv2d(6, 8, 3), "nf4")
    with pytest.raises(ValueError, match=r"x must have shape \(B, 6, H, W\), got \(2, 5, 8, 8\)"):
        layer(torch.randn(2, 5, 8, 8))
    with pytest.raises(
        ValueError, match=r"x must be at least as large as a filter of kernel_size \(3, 3\)"
    ):
        layer(torch.randn(2, 6, 2, 8))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        layer(torch.zeros(2, 6, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="conv must be an nn.Conv2d, got Linear"):
        QuantConv2d.from_conv(nn.Linear(4, 4), "nf4")
    with pytest.raises(NotImplementedError, match="takes activations as they are, got format"):
        QuantConv2d.from_conv(nn.Conv2d(6, 6, 3, groups=2), "int8_a8")
    weight = lowbit.quantize(torch.randn(8, 53), "nf4")
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 54\), got \(8, 53\)"):
        QuantConv2d.from_quant_tensor(weight, like=nn.Conv2d(6, 8, 3))


def test_an_empty_layer_is_filled(tmp_path: Path) -> None:
    first = QuantConv2d.from_conv(nn.Conv2d(6, 8, 3, groups=2), "nf4")
    second = QuantConv2d(6, 8, 3, groups=2, format="nf4")
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
    assert first(torch.randn(0, 6, 5, 5)).shape == (0, 8, 3, 3)


def test_explain_says_what_multiplies() -> None:
    x = torch.randn(2, 6, 9, 9)
    layers = {
        "gemm|gemv": (
            made(QuantConv2d, {"kernel_size": 3}),
            "M=98 N=12 K=54",
            "of tiles of patches",
        ),
        "grouped_conv_f32_": (made(QuantConv2d, {"kernel_size": 3, "groups": 2}), "N=12 K=27", ""),
        "torch": (
            made(QuantConvTranspose2d, {"kernel_size": 3, "groups": 2}),
            "",
            "decoded weight",
        ),
        "": (made(QuantConvTranspose2d, {"kernel_size": 2}), "M=162 N=48 K=6", "of the pixels"),
    }
    for name, (layer, request, how) in layers.items():
        found = layer.explain(x)
        assert re.search(name, found.selected), found
        assert request in found.request
        assert how in found.selected


def test_batch_norms_are_folded() -> None:
    torch.manual_seed(0)
    kinds = [
        (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
        (nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False)),
        (nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), nn.BatchNorm2d(4)),
    ]
    layers = [layer for pair in kinds for layer in pair]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 81, 5), nn.BatchNorm1d(5)).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 2)
                    module.bias.normal_()
        with pytest.raises(ValueError, match="must be in evaluation mode"):
            lowbit.fold_norms(model)
        x = torch.randn(2, 3, 8, 8)
        expected = model.eval()(x)
        assert lowbit.fold_norms(model) == ["1", "3", "5", "7", "10"]
        close(model(x), expected.double(), 1e-5)
    report = lowbit.quantize_model(model, "int8", progress=False)
    assert not report.left


class Shared(nn.Module):
    """A norm whose input is read by something else, and one of a convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """As x."""
        y = self.a(x)
        return self.first(y) + y + self.second(self.b(x)) + self.b(x)


def test_norms_that_others_need_stay() -> None:
    model = Shared().eval()
    assert lowbit.fold_norms(model) == []
    assert isinstance(model.first, nn.BatchNorm2d)
