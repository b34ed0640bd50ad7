"""Results are ordinary tensors, written to in place as those of torch's own layers are; and always the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from strided import same_bits
from torch import Tensor, nn

import lowbit
from lowbit import fp8, int8, qat
from lowbit.formats import parse
from lowbit.nn import fp8_activations as activations
from lowbit.ops.weights import embedding
from weights import random_weight

K, N = 64, 32
SHAPES = ((4, K), (2, 3, K), (K,), (2, 1, 3, K), (0, K), (2, 0, K))
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda y: y.add_(1.5),
    "div_": lambda y: y.div_(3.0),
    "relu_": lambda y: F.relu(y, inplace=True),
    "dropout_": lambda y: F.dropout(y, 0.0, True, True),
    "masked_fill_": lambda y: y.masked_fill_(torch.zeros_like(y, dtype=torch.bool), 0),
    "an element": lambda y: (y.__setitem__((..., 0), 0), y)[1],
    "clamp_": lambda y: y.clamp_(-1, 1),
    "a part": lambda y: (y[..., ::2].mul_(2), y)[1],
}


def dense() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(K, N)


def static() -> nn.Module:
    layer = lowbit.nn.QuantLinear.from_linear(dense(), "int8_row_a8")
    layer.set_input_scale(0.03)
    return layer


def fused() -> Callable[[Tensor], Tensor]:
    """The second of two fused layers, whose product the first has made."""
    block = nn.ModuleDict(
        {
            name: lowbit.nn.QuantLinear.from_linear(dense(), "nf4")
            for name in ("gate_proj", "up_proj")
        }
    )
    assert lowbit.nn.fuse(block) == 1

    def call(x: Tensor) -> Tensor:
        block["gate_proj"](x)
        return block["up_proj"](x)

    return call


def learnable() -> nn.Module:
    layer = lowbit.nn.QuantLinear.from_linear(dense(), "kmeans3_g32_fp32")
    layer.train_parameters(["scales", "table", "bias"])
    return layer


weight = lowbit.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), "nf4")
other = lowbit.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), "int4")
# x (..., K) to y (..., N) or of the shape of x; those with gradients for x.
DIFFERENTIABLE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "linear": lambda: lambda x: lowbit.linear(x, weight),
    "epilogue": lambda: lambda x: lowbit.linear(x, weight, activation="silu"),
    "linear_many": lambda: lambda x: lowbit.linear_many(x, [weight, other])[1],
    "QuantLinear": lambda: lowbit.nn.QuantLinear.from_linear(dense(), "nf4"),
    "int8 activations": lambda: lowbit.nn.QuantLinear.from_linear(dense(), "int8_row_a8"),
    "outliers": lambda: lowbit.nn.QuantLinear.from_linear(dense(), "int3_g64_o2"),
    "learnable": learnable,
    "fused": fused,
    "LLMInt8Linear": lambda: lowbit.nn.LLMInt8Linear.from_linear(dense(), threshold=1.0),
    "LLMInt8Linear, fixed": lambda: lowbit.nn.LLMInt8Linear.from_linear(
        dense(), threshold=1.0, absmax=torch.linspace(0, 2, K)
    ),
    "FP8Linear": lambda: lowbit.nn.FP8Linear.from_linear(dense()),
    "FP8Linear, blocks": lambda: lowbit.nn.FP8Linear.from_linear(dense(), "128x128"),
    "FakeQuantLinear": lambda: qat.FakeQuantLinear.from_linear(dense(), qat.Spec("int4")),
    "BitLinear": lambda: qat.BitLinear(K, N),
    "PACT": lambda: qat.PACT(4),
    "DoReFaActivation": lambda: qat.DoReFaActivation(4),
    "Int8Activation": qat.Int8Activation,
    "XNORActivation": qat.XNORActivation,
    "fp8_silu": lambda: activations.fp8_silu,
    "fp8_gelu": lambda: activations.fp8_gelu,
    "fp8_mul": lambda: lambda x: activations.fp8_mul(x, x + 1),
    "fp8_add": lambda: lambda x: activations.fp8_add(x, x + 1)[0],
    "FP8RMSNorm": lambda: lowbit.nn.FP8RMSNorm(K),
    "FP8LayerNorm": lambda: lowbit.nn.FP8LayerNorm(K),
}
PLAIN: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "static scale": static,
    "BinaryLinear": lambda: lowbit.nn.BinaryLinear.from_linear(dense(), "binary"),
    "embedding": lambda: lambda x: embedding((x * 0).long(), weight),
    "embedding with outliers": lambda: (
        lambda x: embedding((x * 0).long(), lowbit.quantize(torch.ones(N, K), "int3_g64_o2"))
    ),
    "fp8.dequantize": lambda: lambda x: fp8.dequantize(*fp8.quantize(x)),
    "fp8.scaled_mm": lambda: lambda x: fp8.scaled_mm(*_quantized(x), out_dtype=torch.float32),
    "int8.linear": lambda: lambda x: int8.linear(*int8.quantize(x.reshape(-1, K)), other),
    "dequantize": lambda: lambda x: lowbit.dequantize(weight),
}


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, scale_a = fp8.quantize(x.reshape(-1, K))
    b, scale_b = fp8.quantize(torch.ones(N, K))
    return a, b, scale_a, scale_b


def plain(name: str, y: Tensor) -> bool:
    """Whether y is no view; those of torch's own linear are, which is then the result."""
    return not y._is_view() or name == "FakeQuantLinear" or not y.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_with_gradients_are_written_to(name: str, shape: tuple[int, ...]) -> None:
    """In-place ops run, and their gradients are those of the same ops out of place."""
    layer = DIFFERENTIABLE[name]()
    for what, write in IN_PLACE.items():
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert plain(name, y), what
        y = write(y)
        (made,) = torch.autograd.grad(y.square().sum(), x)
        again = layer(x)
        (expected,) = torch.autograd.grad(write(again * 1).square().sum(), x)
        torch.testing.assert_close(made, expected, msg=what)


@pytest.mark.parametrize("name", {**DIFFERENTIABLE, **PLAIN})
def test_results_without_gradients_are_written_to(name: str) -> None:
    """A view that was made under no_grad could not take a tensor that requires grad."""
    layer = {**DIFFERENTIABLE, **PLAIN}[name]()
    for shape in SHAPES:
        with torch.no_grad():
            y = layer(torch.randn(shape))
        assert plain(name, y), shape
        if y._is_view():
            continue
        added = torch.zeros_like(y, requires_grad=True)
        y.add_(added)
        assert torch.equal(torch.autograd.grad(y.sum(), added)[0], torch.ones_like(y))


@pytest.fixture
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(2)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("format", lowbit.formats())
def test_threads_and_repetition_change_no_bit(format: str, dtype: torch.dtype) -> None:
    qt = random_weight(parse(format), 200, 256)
    for m in (1, 5, 70):
        x = torch.randn(m, 256).to(dtype)
        made = []
        for threads in (1, 2, 2, 3, 7):
            torch.set_num_threads(threads)
            made.append(lowbit.linear(x, qt))
        assert all(same_bits(y, made[0]) for y in made), m


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("order", (torch.contiguous_format, torch.channels_last))
def test_convolutions_lie_as_those_of_torch(
    order: torch.memory_format, grad: bool, kernel: int
) -> None:
    conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2)
    layer = lowbit.nn.QuantConv2d.from_conv(conv, "nf4")
    x = torch.randn(2, 4, 5, 7).contiguous(memory_format=order)
    with torch.set_grad_enabled(grad):
        y, expected = layer(x.requires_grad_(grad)), conv(x)
        single = layer(x[0])
    assert y.stride() == expected.stride()
    assert not y._is_view()
    assert not single._is_view()
    F.relu(y, inplace=True)
    assert single.shape == expected.shape[1:]
