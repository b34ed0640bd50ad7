"""Layers of serving programs over stubs of theirs: found, cut among processes, tied and padded; what SGLang is told."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.integrations.served import Catalog
from lowbit.integrations.served_methods import HELD, EmbeddingMethod, LinearMethod
from lowbit.io.readers.native import NativeReader

K, VOCAB = 128, 70
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, K)
        for name, n in (("q_proj", 128), ("k_proj", 32), ("v_proj", 32), ("o_proj", K)):
            self.add_module(name, nn.Linear(K, n, bias=False))
        self.lm_head = nn.Linear(K, VOCAB, bias=False)
        self.experts = nn.ModuleList([nn.Linear(K, K)])
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def folder(path: Path, rules: Any, tied: bool = False) -> NativeReader:
    model = Model(tied)
    lowbit.quantize_model(model, rules, skip=())
    lowbit.save(model, path)
    return NativeReader(path)


class Layer(nn.Module):
    """What the layers of both programs have that the methods look at."""

    def __init__(self, rank: int = 0, world: int = 1, **more: Any) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.num_added_embeddings = rank, world, 0
        for name, value in more.items():
            setattr(self, name, value)


def load(layer: nn.Module, reader: NativeReader, linears: dict[str, Any]) -> None:
    """Hands tensors over as the programs do: by the names of parameters, with a shard or on the tensor."""
    for name, shard in linears.items():
        for full in reader._files:
            module, _, key = full.rpartition(".")
            if module == name:
                p, t = layer.get_parameter(key), reader._files[full].tensor(full)
                if key == "codes":
                    t.shard_id = shard
                    p.weight_loader(p, t)
                else:
                    p.weight_loader(p, t, shard)


def values(reader: NativeReader, name: str) -> Tensor:
    stored = reader.header.tied.get(name, name)
    if stored in reader.header.layers:
        return reader.weight(stored).dequantize()
    return reader.tensor(f"{name}.weight")


@pytest.mark.parametrize(
    "rules", ("int4_g32", "km4", {"k_proj": None, ".*": "nf4_g32_dq8"}), ids=str
)
@pytest.mark.parametrize("world", (1, 2, 4))
def test_heads_of_processes(tmp_path: Path, rules: Any, world: int) -> None:
    """Of four heads of q and one of k and v, which all processes have."""
    reader = folder(tmp_path, rules)
    names = PACKED["qkv_proj"]
    x, full = torch.randn(5, K), [values(reader, name) for name in names]
    for rank in range(world):
        layer = Layer(rank, world, num_kv_head_replicas=world)
        method = LinearMethod(Catalog.of(tmp_path).shards("qkv_proj", PACKED))
        method.create_weights(layer, K, [128 // world, 32, 32], K, 192, torch.float32)
        load(layer, reader, dict(zip(names, ("q", "k", "v"), strict=True)))
        method.process_weights_after_loading(layer)
        method.process_weights_after_loading(layer)  # a second time changes nothing
        weight = torch.cat([full[0].chunk(world)[rank], *full[1:]])
        assert torch.equal(method.dequantize_weight(layer), weight)
        bias = torch.randn(len(weight))
        torch.testing.assert_close(
            method.apply(layer, x, bias),
            nn.functional.linear(x, weight, bias),
            rtol=1e-4,
            atol=1e-4,
        )
        assert not list(layer.parameters())


def test_columns_of_processes_add_up(tmp_path: Path) -> None:
    reader = folder(tmp_path, "int4_g32")
    x, total = torch.randn(3, K), torch.zeros(3, K)
    for rank in range(2):
        layer = Layer(rank, 2)
        method = LinearMethod(Catalog.of(tmp_path).shards("o_proj", PACKED))
        method.create_weights(layer, K // 2, [K], K, K, torch.float32)
        load(layer, reader, {"o_proj": None})
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x.chunk(2, -1)[rank])
    torch.testing.assert_close(total, x @ values(reader, "o_proj").t(), rtol=1e-4, atol=1e-4)


def test_a_world_that_does_not_divide_is_named(tmp_path: Path) -> None:
    reader = folder(tmp_path, "int4_g32")
    layer = Layer(0, 3)
    method = LinearMethod(Catalog.of(tmp_path).shards("o_proj", PACKED))
    method.create_weights(layer, K, [42], K, K, torch.float32)
    load(layer, reader, {"o_proj": None})
    with pytest.raises(ValueError, match="o_proj: 3 processes cannot have 42 of its 128 rows each"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("world", (1, 2))
def test_rows_of_processes(tmp_path: Path, tied: bool, world: int) -> None:
    reader = folder(tmp_path, {"embed_tokens|lm_head": "int8_g32", ".*": None}, tied)
    catalog, padded = Catalog.of(tmp_path), 128 // world
    x, ids = torch.randn(3, K), torch.tensor([0, 5])
    for rank in range(world):
        start, stop = rank * padded, min(VOCAB, (rank + 1) * padded)
        at = types.SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
        layers = [
            Layer(rank, world, shard_indices=at, num_embeddings_per_partition=padded) for _ in "eh"
        ]
        methods = [EmbeddingMethod(catalog.shards(n, PACKED)) for n in ("embed_tokens", "lm_head")]
        for layer, method in zip(layers, methods, strict=True):
            layer.quant_method = method
            method.create_weights(layer, K, [padded], K, 128, params_dtype=torch.float32)
        (embedding, head), (rows, product) = layers, methods
        if tied:
            assert product.tie_weights(head, embedding) is head
        else:
            load(head, reader, {"lm_head": None})
        load(embedding, reader, {"embed_tokens": None})
        product.process_weights_after_loading(head)
        rows.process_weights_after_loading(embedding)
        want = values(reader, "embed_tokens")[start:stop]
        assert torch.equal(rows.embedding(embedding, ids), want[ids])
        y = product.apply(head, x, torch.ones(padded))
        assert y.shape == (3, padded)
        want = values(reader, "lm_head")[start:stop]
        torch.testing.assert_close(y[:, : len(want)], x @ want.t() + 1, rtol=1e-4, atol=1e-4)
        assert not y[:, len(want) :].any()
        assert hasattr(embedding, HELD)


def test_rows_that_are_not_there_are_named(tmp_path: Path) -> None:
    reader = folder(tmp_path, {"embed_tokens|lm_head": "int8_g32", ".*": None})
    at = types.SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=VOCAB + 1)
    layer = Layer(0, 1, shard_indices=at, num_embeddings_per_partition=128)
    method = EmbeddingMethod(Catalog.of(tmp_path).shards("embed_tokens", PACKED))
    method.create_weights(layer, params_dtype=torch.float32)
    load(layer, reader, {"embed_tokens": None})
    with pytest.raises(
        ValueError, match="embed_tokens: process 0 of 1 cannot have the rows from 0 to 71 of 70"
    ):
        method.process_weights_after_loading(layer)


def test_entry_points_are_functions() -> None:
    """Those that pyproject.toml names: they import without the programs."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    named = re.findall(r'^lowbit = "(lowbit\.integrations\.\w+):(\w+)"', text, re.MULTILINE)
    assert [name for name, _ in named] == ["lowbit.integrations.vllm", "lowbit.integrations.sglang"]
    for module, function in named:
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("program", ("vLLM", "SGLang"))
def test_a_program_of_another_version_goes_on(
    program: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = program.lower()
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, f"lowbit.integrations.{name}_layers", raising=False)
    importlib.import_module(f"lowbit.integrations.{name}").register()
    assert f"lowbit is not registered in this version of {program}: " in caplog.text


class _Base:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


SGLANG: dict[str, dict[str, Any]] = {
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.layers": {},
    "sglang.srt.layers.quantization": {
        f"{kind}QUANTIZATION_METHODS": {} for kind in ("", "BASE_", "CPU_")
    },
    "sglang.srt.layers.linear": {"LinearBase": type("LinearBase", (Layer,), {})},
    "sglang.srt.layers.quantization.base_config": {
        "QuantizationConfig": _Base,
        "LinearMethodBase": type("LinearMethodBase", (), {}),
        "QuantizeMethodBase": type("QuantizeMethodBase", (), {}),
    },
    "sglang.srt.layers.quantization.unquant": {
        "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {})
    },
    "sglang.srt.layers.vocab_parallel_embedding": {
        "VocabParallelEmbedding": type("VocabParallelEmbedding", (Layer,), {})
    },
}


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of SGLang 0.5 that the integration imports."""
    for name, members in SGLANG.items():
        module = types.ModuleType(name)
        vars(module).update(
            {key: dict(v) if isinstance(v, dict) else v for key, v in members.items()}
        )
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lowbit.integrations.sglang_layers", raising=False)
    importlib.import_module("lowbit.integrations.sglang").register()
    yield vars(sys.modules["sglang.srt.layers.quantization"])
    monkeypatch.delitem(sys.modules, "lowbit.integrations.sglang_layers")


def test_sglang_finds_the_layers(sglang: dict[str, Any], tmp_path: Path) -> None:
    folder(tmp_path, {"experts": "int4_g32", "o_proj": None, ".*": "int4_g32"})
    kind = sglang["QUANTIZATION_METHODS"]["lowbit"]
    importlib.import_module("lowbit.integrations.sglang").register()
    for table in ("QUANTIZATION_METHODS", "BASE_QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS"):
        assert sglang[table] == {"lowbit": kind}
    model = types.SimpleNamespace(_name_or_path=str(tmp_path))
    config = kind.from_config({"quant_method": "lowbit", "hf_config": model})
    assert (kind.get_name(), kind.get_config_filenames(), kind.get_min_capability()) == (
        "lowbit", [], 80,
    )  # fmt: skip
    assert torch.bfloat16 in kind.get_supported_act_dtypes()
    linear = SGLANG["sglang.srt.layers.linear"]["LinearBase"]()
    rows = SGLANG["sglang.srt.layers.vocab_parallel_embedding"]["VocabParallelEmbedding"]()
    assert isinstance(config.get_quant_method(linear, "qkv_proj"), LinearMethod)
    assert not isinstance(config.get_quant_method(linear, "o_proj"), LinearMethod)
    assert isinstance(config.get_quant_method(rows, "lm_head"), EmbeddingMethod)
    assert config.get_quant_method(nn.Module(), "attn") is None
    with pytest.raises(
        NotImplementedError, match="experts: packed experts are not computed in SGLa"
    ):
        config.get_quant_method(nn.Module(), "experts")
    config.apply_weight_name_mapper(types.SimpleNamespace(_map_name=lambda name: f"m.{name}"))
    assert isinstance(config.get_quant_method(linear, "m.qkv_proj"), LinearMethod)
    with pytest.raises(ValueError, match="the model must be a folder, as formats are in its files"):
        kind.from_config({"hf_config": types.SimpleNamespace(_name_or_path="someone/model")})
