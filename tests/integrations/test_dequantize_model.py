"""lowbit.dequantize_model, to_linear and to_embedding: the values of the packed weights; all else stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.nn import QuantEmbedding, QuantLinear, ReorderedLinear
from lowbit.nn.embedding import ScaledEmbedding

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(7)


class Net(nn.Module):
    """An embedding, two siblings, and a head with the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64, padding_idx=3)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.a(x) * self.b(x))


def packed() -> Net:
    net = Net()
    rules = {"embed|head": "int8_g32", ".*": "int4_g32"}
    lowbit.quantize_model(net, rules, skip=(), progress=False)
    return net


def test_a_model_is_dense_again() -> None:
    net, calls = packed(), []
    net.a.note = "kept"
    net.a.register_forward_hook(lambda *_: calls.append(1))
    weights = {name: getattr(net, name).quant_tensor().dequantize() for name in ("a", "b", "embed")}
    bias, y = net.a.bias, net(IDS)
    lowbit.nn.fuse(net)
    assert lowbit.dequantize_model(net) == ["embed", "a", "b", "head"]
    assert {type(m) for m in net.children()} == {nn.Linear, nn.Embedding}
    for name, weight in weights.items():
        assert torch.equal(getattr(net, name).weight, weight)
    assert net.head.weight is net.embed.weight
    assert (net.a.bias is bias, net.a.note, net.embed.padding_idx) == (True, "kept", 3)
    torch.testing.assert_close(net(IDS), y)
    assert calls == [1, 1]
    assert not list(net.buffers())
    assert lowbit.dequantize_model(net) == []
    # Nothing of the packed layers is left that a second time would stumble on.
    report = lowbit.quantize_model(net, "nf4", skip=(), progress=False)
    assert len(report.layers) == 3


def test_dtype_and_modules() -> None:
    layer = QuantLinear.from_linear(nn.Linear(70, 33).bfloat16(), "nf4")
    assert layer.to_linear().weight.dtype == torch.bfloat16
    assert torch.equal(layer.to_linear(torch.float32).weight, layer.quant_tensor().dequantize())
    weight = lowbit.quantize(torch.randn(33, 70), "int4_g32")
    order = torch.randperm(70)
    reordered = ReorderedLinear.from_ordered(weight, order)
    expected = weight.dequantize()[:, torch.argsort(order)]
    assert torch.equal(reordered.to_linear().weight, expected)
    scaled = ScaledEmbedding(torch.randn(9, 64), None, 8.0)
    embedding = QuantEmbedding.from_embedding(scaled, "int8_g32")
    back = embedding.to_embedding()
    assert isinstance(back, ScaledEmbedding)
    assert torch.equal(back(IDS), embedding(IDS))
    net = packed()
    lowbit.dequantize_model(net, torch.float16)
    assert net.b.weight.dtype == torch.float16


def test_models_of_transformers_within_another(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        num_key_value_heads=2,
    )  # fmt: skip
    inner = transformers.LlamaForCausalLM(config).eval()
    outer = nn.ModuleDict({"model": inner, "head": nn.Linear(64, 8)})
    lowbit.quantize_model(outer, "int4_g32", progress=False)
    assert len(lowbit.dequantize_model(outer)) == 8
    assert not hasattr(inner, "hf_quantizer")
    inner.save_pretrained(tmp_path)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found(IDS[None]).logits, inner(IDS[None]).logits)


def test_bad_input() -> None:
    net = packed()
    with pytest.raises(ValueError, match="model is a QuantLinear itself: its to_linear"):
        lowbit.dequantize_model(net.a)
