"""lowbit.dequantize_model, to_linear and to_embedding: the values of the packed weights; all else stays."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.integrations import dense, dequantizing
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear, ReorderedLinear
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


def state_of(model: nn.Module) -> list[object]:
    """Identities of modules, tensors and hooks, and the names of attributes."""
    found: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own, config = vars(module), vars(module).get("config")
        hooks = {key: list(value.items()) for key, value in own.items() if key.endswith("_hooks")}
        found.append(
            (name, id(module), sorted(own), hooks, vars(config).copy() if config else None)
        )
        tensors = {**module._parameters, **module._buffers}
        found.append({key: id(t) for key, t in tensors.items()})
        for hook in module._load_state_dict_pre_hooks.values():
            found.append(hook.module() is module)
    return found


@pytest.mark.parametrize("failing", ["no dense form", 3, 9, 16, 18])
def test_whatever_is_raised_it_is_as_it_was(monkeypatch, failing: str | int) -> None:
    """Two models of transformers, with experts, and packed layers beside them that are fused."""
    transformers = pytest.importorskip("transformers")
    from lowbit.integrations import quantizing

    size = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    config = transformers.MixtralConfig(**size, num_key_value_heads=2, num_local_experts=2)
    inner = [transformers.MixtralForCausalLM(config).eval() for _ in range(2)]
    outer = nn.ModuleDict({"first": inner[0], "second": inner[1], "net": Net()})
    lowbit.quantize_model(outer, "int4_g32", progress=False)
    q = inner[0].model.layers[0].self_attn.q_proj
    q.register_load_state_dict_pre_hook(lambda *_: None)
    q.register_forward_hook(lambda *_: None)
    assert lowbit.nn.fuse(outer) == 2
    if failing == "no dense form":
        inner[1].extra = PackedModule(lowbit.quantize(torch.randn(64, 64), "nf4"))
    else:
        _fail_at(monkeypatch, quantizing, failing)
    before, ids = state_of(outer), IDS[None]
    fused = q._siblings
    y = inner[0](ids).logits, outer["net"](IDS)
    with pytest.raises((NotImplementedError, KeyboardInterrupt)):
        lowbit.dequantize_model(outer)
    assert state_of(outer) == before
    assert q._siblings is fused
    assert len(fused.layers) == 3
    assert torch.equal(inner[0](ids).logits, y[0])
    assert torch.equal(outer["net"](IDS), y[1])


def _fail_at(monkeypatch, quantizing, number: int) -> None:
    """The layer of this number is interrupted."""
    count = itertools.count(1)

    def dense_of(module, dtype):
        if next(count) == number:
            raise KeyboardInterrupt
        return dense.dense_of(module, dtype)

    monkeypatch.setattr(dequantizing, "dense_of", dense_of)
    monkeypatch.setattr(quantizing, "dense_of", dense_of)


def test_bad_input() -> None:
    net = packed()
    with pytest.raises(ValueError, match="model is a QuantLinear itself: its to_linear"):
        lowbit.dequantize_model(net.a)
