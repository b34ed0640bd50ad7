"""torch.fx: every layer is one node of a traced model, as the layers of torch.nn are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import qat
from lowbit.layouts import Operands
from lowbit.ops.weights import embedding

K, N = 64, 32


def dense() -> nn.Linear:
    return nn.Linear(K, N)


def static() -> nn.Module:
    layer = lowbit.nn.QuantLinear.from_linear(dense(), "int8_row_a8")
    layer.set_input_scale(0.03)
    return layer


def learnable() -> nn.Module:
    layer = lowbit.nn.QuantLinear.from_linear(dense(), "nf4")
    layer.train_parameters(["scales", "bias"])
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "QuantLinear": lambda: lowbit.nn.QuantLinear.from_linear(dense(), "nf4"),
    "static scale": static,
    "learnable": learnable,
    "outliers": lambda: lowbit.nn.QuantLinear.from_linear(dense(), "int3_g64_o2"),
    "LLMInt8Linear": lambda: lowbit.nn.LLMInt8Linear.from_linear(dense(), threshold=1.0),
    "BinaryLinear": lambda: lowbit.nn.BinaryLinear.from_linear(dense(), "binary"),
    "FP8Linear": lambda: lowbit.nn.FP8Linear.from_linear(dense()),
    "FP8RMSNorm": lambda: lowbit.nn.FP8RMSNorm(K),
    "FP8LayerNorm": lambda: lowbit.nn.FP8LayerNorm(K),
    "FakeQuantLinear": lambda: qat.FakeQuantLinear.from_linear(dense(), qat.Spec("int4")),
    "BitLinear": lambda: qat.BitLinear(K, N),
    "PACT": lambda: qat.PACT(4),
    "DoReFaActivation": lambda: qat.DoReFaActivation(4),
    "Int8Activation": qat.Int8Activation,
    "XNORActivation": qat.XNORActivation,
    "LSQActivation": lambda: qat.LSQActivation(4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_node(name: str) -> None:
    model = nn.Sequential(nn.Tanh(), LAYERS[name](), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]
    assert traced.state_dict().keys() == model.state_dict().keys()
    for shape in ((4, K), (2, 3, K)):
        x = torch.rand(shape)
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: lowbit.nn.QuantEmbedding.from_embedding(nn.Embedding(9, 8), "nf4"), torch.tensor([[1, 8]])),
        (lambda: lowbit.nn.QuantConv2d.from_conv(nn.Conv2d(4, 8, 3), "nf4"), torch.randn(2, 4, 5, 5)),
    ],
)  # fmt: skip
def test_other_inputs(layer: Callable[[], nn.Module], x: Tensor) -> None:
    model = nn.Sequential(layer())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(x), model(x))


def test_a_quantized_model_and_fused_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = dense(), dense(), nn.Linear(N, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    model = Block()
    lowbit.quantize_model(model, "nf4", progress=False)
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_functions_are_nodes() -> None:
    qt = lowbit.quantize(torch.randn(N, K), "nf4")
    for f, x in (
        (lambda x: lowbit.linear(x, qt), torch.randn(3, K)),
        (lambda i: embedding(i, qt), torch.tensor([[3, 1]])),
    ):
        traced = torch.fx.symbolic_trace(f)
        called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert len(called) == 2  # the operands, and what they are given to
        assert called[0] is Operands
        assert torch.equal(traced(x), f(x))
