"""Every layer under torch.compile: one graph, in training and evaluation, with and without gradients, at any batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowbit import nn as lnn

K, N = 64, 48
Make = Callable[[], nn.Module]


def linear(format: str) -> Make:
    return lambda: lnn.QuantLinear.from_linear(nn.Linear(K, N), format)


def static() -> nn.Module:
    layer = lnn.QuantLinear.from_linear(nn.Linear(K, N), "int8_row_a8")
    layer.set_input_scale(0.03)
    return layer


def trainable(names: list[str]) -> Make:
    def make() -> nn.Module:
        layer = lnn.QuantLinear.from_linear(nn.Linear(K, N), "kmeans3_pr_fp32_g32")
        layer.train_parameters(names)
        return layer

    return make


def llm_int8(dynamic: bool) -> Make:
    absmax = None if dynamic else torch.linspace(0, 8, K)
    return lambda: lnn.LLMInt8Linear.from_linear(nn.Linear(K, N), absmax=absmax)


def fp8(granularity: str) -> Make:
    return lambda: lnn.FP8Linear(K, N, granularity=granularity)


LAYERS: dict[str, Make] = {
    **{f: linear(f) for f in ("nf4", "int8_row_a8", "int3_g64_o4")},
    "static int8": static,
    "trainable": trainable(["table", "bias"]),
    "LLM.int8 dynamic": llm_int8(True),
    "LLM.int8 static": llm_int8(False),
    "BinaryLinear": lambda: lnn.BinaryLinear.from_linear(nn.Linear(K, N), "binary_row"),
    **{f"FP8Linear {g}": fp8(g) for g in ("tensor", "128x128")},
    "FP8RMSNorm": lambda: lnn.FP8RMSNorm(K),
    "QuantEmbedding": lambda: Embedded(),
    "fused": lambda: Siblings(),
    "QuantConv2d": lambda: nn.Sequential(
        nn.Unflatten(-1, (4, 4, 4)),
        lnn.QuantConv2d.from_conv(nn.Conv2d(4, 5, 3), "int4_row"),
    ),
}


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear("nf4")(), linear("int4")()
        assert lnn.fuse(self) == 1

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(x) * self.up_proj(x)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = lnn.QuantEmbedding.from_embedding(nn.Embedding(9, K), "int4_g16")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(x[:, 0].long().abs() % 9)


MODES: dict[str, tuple[bool, Callable[[], contextlib.AbstractContextManager[object]]]] = {
    "eval, no_grad": (False, torch.no_grad),
    "eval, inference_mode": (False, torch.inference_mode),
    "train, gradients": (True, torch.enable_grad),
}
NO_GRADIENTS = ("static int8", "BinaryLinear")

# Dynamo makes an instance of every autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def results(layer: nn.Module, module: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    """The product, and the gradients that it has."""
    y = module(x)
    if not y.requires_grad:
        return [y]
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph(name: str, mode: str) -> None:
    training, context = MODES[mode]
    layer = LAYERS[name]().train(training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with context():
        for rows in (3, 1):
            gradients = torch.is_grad_enabled() and name not in NO_GRADIENTS
            x = torch.randn(rows, K, requires_grad=gradients)
            for a, b in zip(results(layer, layer, x), results(layer, compiled, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
