"""What a format or a layer records is honoured on every path that computes with it, and `explain` says what ran."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowbit
from lowbit import _C, int8, layouts, reference
from lowbit.decoder import bound
from lowbit.explanation import explain_request
from lowbit.formats import FORMATS, parse
from lowbit.layouts import CANONICAL, K16, M16
from lowbit.nn import LLMInt8Linear, QuantConv2d, QuantEmbedding, QuantLinear, fuse
from lowbit.weights.quantized import QuantTensor
from weights import random_weight

N, K = 70, 96
SCALE = 0.02
# A recorded choice, and the format without it.
CHOICES = {
    "int8": ("int4_g32_a8", "int4_g32"),
    "int8, rows": ("int8_row_a8", "int8_row"),
    "int8, zeros": ("uint4_g32_a8", "uint4_g32"),
    "int8 table": ("nf4_a8t", "nf4"),
    "int8, fitted table": ("kmeans4_a8t", "kmeans4"),
    "outliers": ("int4_g32_o3", "int4_g32"),
    "int8 and outliers": ("int8_a8_o2", "int8_o2"),
    "static": ("int4_g32_a8", "int4_g32_a8"),
    "static, int8 table": ("nf4_a8t", "nf4_a8t"),
}


def layer(choice: str) -> QuantLinear:
    made = QuantLinear.from_linear(nn.Linear(K, N), CHOICES[choice][0])
    if choice.startswith("static"):
        made.set_input_scale(SCALE)
    return made.requires_grad_(False)


def expected(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """By the reference, the choice included."""
    qt = made.quant_tensor()
    if made.input_scale is None:
        return reference.linear(x, qt, made.bias)
    rows = x.reshape(-1, K)
    q, scales = reference.quantize_int8(rows, None, torch.full((len(rows),), SCALE))
    weight = (
        qt.unpack(),
        qt.format,
        reference.effective_scales(qt),
        reference.effective_zeros(qt),
        qt.table,
    )
    return reference.int8_linear(q, scales, *weight, made.bias).to(x.dtype).view(*x.shape[:-1], N)


def without(made: QuantLinear, x: torch.Tensor, choice: str) -> torch.Tensor:
    """As if the choice had not been recorded."""
    qt = made.quant_tensor()
    if choice.startswith("static"):
        return reference.linear(x, qt, made.bias)
    plain = parse(CHOICES[choice][1])
    tensors = {k: t for k, t in qt.tensors.items() if plain.outliers or not k.startswith("outlier")}
    return reference.linear(x, QuantTensor(plain, (N, K), tensors), made.bias)


def saved(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(x)


def loaded(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    other = QuantLinear(K, N, format=made.format)
    other.load_state_dict(made.state_dict())
    return other(x)


def stored(made: QuantLinear, x: torch.Tensor, tmp_path) -> torch.Tensor:
    path = lowbit.save(nn.Sequential(made), tmp_path / "model.safetensors")
    return lowbit.load(nn.Sequential(nn.Linear(K, N)), path)[0](x)


def siblings(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    block = nn.Module()
    block.gate_proj, block.up_proj = made, copy.deepcopy(made)
    fuse(block)
    first, second = block.gate_proj(x), block.up_proj(x)
    assert torch.equal(first, second)
    return second


def convolved(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    conv = QuantConv2d.from_quant_tensor(
        made.quant_tensor(), made.bias, like=torch.nn.Conv2d(K, N, 1)
    )
    conv.set_input_scale(made.input_scale)
    rows = x.reshape(-1, K)
    y = conv(rows.t().reshape(1, K, len(rows), 1))
    return y[0, :, :, 0].t().reshape(*x.shape[:-1], N)


def many(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    return lowbit.linear_many(x, [made.kernel_weight()] * 2, [None, made.bias])[1]


def followed(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    residual = torch.zeros(*x.shape[:-1], N, dtype=x.dtype)
    return lowbit.linear(x, made.kernel_weight(), made.bias, residual=residual)


def bound_call(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, K).contiguous()
    out = torch.empty(len(rows), N, dtype=x.dtype)
    bound.bind_linear(rows, made.kernel_weight(), out, made.bias)()
    return out.view(*x.shape[:-1], N)


def in_layout(layout: str) -> Callable[[QuantLinear, torch.Tensor], torch.Tensor]:
    def call(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        w = layouts.to_kernel(made.quant_tensor(), layout)
        if made.input_scale is not None:
            return int8.static_linear(x, made.input_scale, w, made.bias)
        return lowbit.linear(x, w, made.bias)

    return call


def trained(made: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_(made.input_scale is None)
    return made(x).detach()


LAYERS = {
    "layer": lambda made, x: made(x),
    "copy": lambda made, x: copy.deepcopy(made)(x),
    "pickle": saved,
    "state dict": loaded,
    "file": stored,
    "siblings": siblings,
    "conv": convolved,
    "gradients": trained,
}
# What takes a weight, not a layer, and so cannot know of a layer's static scale.
WEIGHTS = {
    "many": many,
    "epilogue": followed,
    "bound": bound_call,
    "QuantTensor": lambda made, x: lowbit.linear(x, made.quant_tensor(), made.bias),
}
LAYOUTS = {layout: in_layout(layout) for layout in (CANONICAL, K16)}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("path", [*LAYERS, *WEIGHTS, *LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_path_honours_it(path: str, choice: str, dtype: torch.dtype, tmp_path) -> None:
    if path in WEIGHTS and choice.startswith("static"):
        pytest.skip("the scale belongs to the layer")
    if path == K16:
        pytest.importorskip("triton")
    made = layer(choice)
    for shape in ((1, K), (3, K), (2, 9, K)):
        x = torch.randn(shape).to(dtype)
        call = {**LAYERS, **WEIGHTS, **LAYOUTS}[path]
        y = call(made, x, tmp_path) if path == "file" else call(made, x)
        want, other = expected(made, x), without(made, x, choice)
        # int8 products are exact up to the rounding of the result, others up to that of their sums.
        eps = torch.finfo(dtype).eps
        error = (y.float() - want.float()).abs().max()
        assert error <= 2 * eps * want.float().abs().max() + 1e-6 * K, (path, choice, shape)
        if dtype == torch.float32:
            assert (y - other).abs().max() > 20 * error, (path, choice, shape)


@pytest.mark.parametrize("name", ["int4_g32_a8", "nf4_a8t", "int4_g32_o3"])
def test_rows_of_an_embedding_do_not_depend_on_activations(name: str) -> None:
    qt = lowbit.quantize(torch.randn(N, K), name)
    rows = QuantEmbedding.from_quant_tensor(qt, torch.float32)(torch.arange(N))
    assert torch.equal(rows, reference.dequantize(qt))


@pytest.mark.parametrize("absmax", [None, torch.ones(K)], ids=["found", "given"])
def test_llm_int8_quantizes_what_is_no_outlier(absmax: torch.Tensor | None) -> None:
    dense = nn.Linear(K, N)
    made = LLMInt8Linear.from_linear(dense, "int8_row_a8", absmax=absmax)
    x = torch.randn(5, K)
    qt = made.quantized.quant_tensor()
    torch.testing.assert_close(made(x), reference.linear(x, qt, dense.bias), rtol=1e-6, atol=1e-6)


FORMATS_TO_EXPLAIN = [
    *FORMATS,
    "int8_row_a8",
    "int4_g32_a8",
    "int4_g20_a8",
    "uint4_g32_a8",
    "nf4_a8t",
    "kmeans4_a8t",
    "e4m3_a8t",
    "int8_a8_o2",
    "int3_g64_o4",
]


@pytest.mark.parametrize("name", FORMATS_TO_EXPLAIN)
def test_explain_says_what_ran(name: str) -> None:
    qt = random_weight(parse(name), 200, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m in (1, 2, 4, 7, 16, 33, 130):
            x = torch.randn(m, 256).to(dtype)
            said = lowbit.explain(x, qt).selected
            strided = x.t().contiguous().t()  # read by another entry point
            for rows, activation in ((x, None), (strided, None), (x, "relu")):
                _C.take_kernels_run()
                lowbit.linear(rows, qt, activation=activation)
                assert _C.take_kernels_run() == [said], (dtype, m)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_a8", "nf4_a8t", "binary"])
@pytest.mark.parametrize("layout", [K16, M16, CANONICAL])
def test_explain_of_layouts_without_int8_kernels(name: str, layout: str) -> None:
    """torch multiplies int8 activations and signs there, on a GPU with its int8 units, and `explain` says so."""
    qt = random_weight(parse(name), 64, 64)
    w = layouts.to_operands(qt, layout)
    device = "cuda" if layout == M16 else "cpu"
    if layout == M16 and qt.format.activation is None:
        pytest.skip("the choice of a CUDA kernel asks the device")
    for x in (torch.randn(3, 64), torch.zeros(3, 8, dtype=torch.uint8)):
        said = explain_request(w.format, 64, 64, 3, x.dtype, device, layout).selected
        plain = qt.format.activation is not None or x.dtype == torch.uint8 or layout == CANONICAL
        assert (said == ("torch._int_mm" if device == "cuda" else "reference")) == plain
