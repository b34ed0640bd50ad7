"""Layers of vLLM with packed weights, and its choice of kernels, in one process: runs where vLLM is installed."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit

with warnings.catch_warnings():
    # Its modules and those of others that it imports warn.
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vLLM: make vllm")

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.kernels.linear import (
        _POSSIBLE_KERNELS,
        MPLinearLayerConfig,
        choose_mp_linear_kernel,
    )
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    from lowbit.integrations.vllm import register
    from lowbit.integrations.vllm_integers import LowbitLinearKernel
    from lowbit.integrations.vllm_layers import (
        LowbitEmbeddingMethod,
        LowbitLinearMethod,
        LowbitVllmConfig,
    )
    from lowbit.io.readers.native import NativeReader

pytestmark = pytest.mark.filterwarnings("default")
K, VOCAB = 128, 70
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIZES = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": K}
MIXED = {
    "q_proj": "int4_g32", "k_proj": "nf4_g32", "v_proj": None, "embed_tokens|lm_head": "int8_g32", ".*": "int4_g32",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What layers of vLLM need around them."""
    register()
    file = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, K)
        for name, n in SIZES.items():
            self.add_module(name, nn.Linear(96 if name == "down_proj" else K, n))
        self.lm_head = nn.Linear(K, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def folder(path: Path, rules: Any, tied: bool = False) -> tuple[LowbitVllmConfig, NativeReader]:
    model = Model(tied)
    lowbit.quantize_model(model, rules, skip=())
    lowbit.save(model, path)
    (path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "lowbit"}})
    )
    config = get_quantization_config("lowbit").from_config({"quant_method": "lowbit"})
    config.packed_modules_mapping = PACKED
    config.maybe_update_config(str(path))
    return config, NativeReader(path)


def load(
    layer: nn.Module, reader: NativeReader, names: list[str], shards: list[Any], *first: nn.Module
) -> None:
    """Hands the tensors of linears to a layer as vLLM does: by the names of its parameters, with their shards."""
    stored = {n: reader._files[n].tensor(n) for n in reader._files}
    for name, shard in zip(names, shards, strict=True):
        for full, t in stored.items():
            module, _, key = full.rpartition(".")
            if module == name:
                p = layer.get_parameter(key)
                p.weight_loader(p, t, shard) if shard is not None else p.weight_loader(p, t)
    for each in first:
        each.quant_method.process_weights_after_loading(each)
    layer.quant_method.process_weights_after_loading(layer)


def product(reader: NativeReader, name: str, x: Tensor) -> Tensor:
    bias = reader.tensor(f"{name}.bias") if f"{name}.bias" in reader.dense else None
    stored = reader.header.tied.get(name, name)
    if stored in reader.header.layers:
        return lowbit.linear(x, reader.weight(stored), bias)
    return nn.functional.linear(x, reader.tensor(f"{name}.weight"), bias)


def test_registering_again_changes_nothing() -> None:
    before = list(_POSSIBLE_KERNELS[PlatformEnum.CPU])
    register()
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU] == before
    assert before.count(LowbitLinearKernel) == 1
    assert get_quantization_config("lowbit") is LowbitVllmConfig


def test_the_kernel_is_the_first_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own takes the weight there, and fails in the first product."""
    own = [k for k in _POSSIBLE_KERNELS[PlatformEnum.CPU] if k is not LowbitLinearKernel]
    for supported in (True, False):
        kernels = list(own)
        monkeypatch.setitem(_POSSIBLE_KERNELS, PlatformEnum.CPU, kernels)
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda answer=supported: answer)
        register()
        register()
        assert kernels == ([*own, LowbitLinearKernel] if supported else [LowbitLinearKernel, *own])


def test_the_entry_point_is_that_of_the_package() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [e.load() for e in found if e.name == "lowbit"] == [register]


@pytest.mark.parametrize("rules", ("int4_g32", "nf4_g32_dq8", "km4", MIXED), ids=str)
def test_merged_linears(tmp_path: Path, rules: Any) -> None:
    config, reader = folder(tmp_path, rules)
    x = torch.randn(5, K)
    qkv = QKVParallelLinear(K, 32, 4, 2, quant_config=config, prefix="qkv_proj")
    assert isinstance(qkv.quant_method, LowbitLinearMethod)
    load(qkv, reader, PACKED["qkv_proj"], ["q", "k", "v"])
    want = torch.cat([product(reader, name, x) for name in PACKED["qkv_proj"]], -1)
    torch.testing.assert_close(qkv(x)[0], want, rtol=1e-5, atol=1e-5)
    gate_up = MergedColumnParallelLinear(K, [96, 96], quant_config=config, prefix="gate_up_proj")
    load(gate_up, reader, PACKED["gate_up_proj"], [0, 1])
    want = torch.cat([product(reader, name, x) for name in PACKED["gate_up_proj"]], -1)
    torch.testing.assert_close(gate_up(x)[0], want, rtol=1e-5, atol=1e-5)
    assert not [n for n, p in gate_up.named_parameters() if "bias" not in n and p.numel() == 0]


def test_rows_parallel_and_what_is_dense(tmp_path: Path) -> None:
    config, reader = folder(tmp_path, {"down_proj": "int4_g32", ".*": None})
    x = torch.randn(3, 96)
    down = RowParallelLinear(96, K, quant_config=config, prefix="down_proj")
    load(down, reader, ["down_proj"], [None])
    torch.testing.assert_close(down(x)[0], product(reader, "down_proj", x), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        down.quant_method.dequantize_weight(down), reader.weight("down_proj").dequantize()
    )
    gate_up = MergedColumnParallelLinear(K, [96, 96], quant_config=config, prefix="gate_up_proj")
    assert isinstance(gate_up.quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(VocabParallelEmbedding(VOCAB, K), "embed_tokens") is None


@pytest.mark.parametrize("tied", (False, True))
def test_embedding_and_head(tmp_path: Path, tied: bool) -> None:
    config, reader = folder(tmp_path, MIXED, tied)
    embedding = VocabParallelEmbedding(VOCAB, K, quant_config=config, prefix="embed_tokens")
    head = ParallelLMHead(VOCAB, K, quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, LowbitEmbeddingMethod)
    if tied:
        head = head.tie_weights(embedding)
        assert not list(head.parameters())
        load(embedding, reader, ["embed_tokens"], [None], head)  # whose turn may come first
    else:
        load(embedding, reader, ["embed_tokens"], [None])
        load(head, reader, ["lm_head"], [None])
    ids = torch.tensor([0, VOCAB - 1, 3])
    assert torch.equal(embedding(ids), reader.weight("embed_tokens").dequantize()[ids])
    x = torch.randn(4, K)
    y = head.quant_method.apply(head, x)
    assert y.shape == (4, 128)  # vLLM's padded vocabulary
    assert torch.equal(y[:, :VOCAB], product(reader, "lm_head", x))
    assert not y[:, VOCAB:].any()


def test_a_layer_of_which_tensors_are_missing_is_named(tmp_path: Path) -> None:
    config, _ = folder(tmp_path, "int4_g32")
    down = RowParallelLinear(96, K, quant_config=config, prefix="down_proj")
    with pytest.raises(ValueError, match="down_proj: format 'int4_g32' has the tensors"):
        down.quant_method.process_weights_after_loading(down)


KINDS = {
    "uint4b8": True,
    "uint8b128": True,
    "uint4": False,
    "uint3b4": True,
    "uint2": False,
    "int4": False,
}


@pytest.mark.parametrize("name", KINDS)
def test_what_the_kernel_takes(name: str) -> None:
    kind = getattr(scalar_types, name)
    config = MPLinearLayerConfig((96, 33), (96, 33), kind, torch.bfloat16, 32, not KINDS[name])
    ok, why = LowbitLinearKernel.can_implement(config)
    assert ok == (name != "int4"), why
    if not ok:
        assert "unsigned integers" in str(why)
        return
    # Of sizes that no other kernel takes.
    assert choose_mp_linear_kernel(config) is LowbitLinearKernel
    config.group_size = 36
    assert "groups of 36 must divide the 96" in str(LowbitLinearKernel.can_implement(config)[1])


@pytest.fixture
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CPUWNA16LinearKernel")


def exported(path: Path, kind: str, format: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one linear (64, 128) as `lowbit export` writes them, and its values."""
    from lowbit.export import compressed_tensors, gptq
    from lowbit.export.folders import Integers

    weight = lowbit.quantize(torch.randn(64, K), format)
    how = Integers(weight.format, 64, K, False)
    module = gptq if kind == "gptq" else compressed_tensors
    return module._tensors(how, weight.unpack(), weight, None), weight.dequantize()


@pytest.mark.usefixtures("_only_ours")
@pytest.mark.parametrize("bias", (False, True))
def test_gptq(tmp_path: Path, bias: bool) -> None:
    tensors, values = exported(tmp_path, "gptq", "int4_g32")
    config = AutoGPTQConfig(4, 32, False, True, False, {}, {})
    layer = RowParallelLinear(
        K, 64, bias, params_dtype=torch.bfloat16, quant_config=config, prefix="o"
    )
    check(layer, {n: t for n, t in tensors.items() if n != "g_idx"}, values, bias)


@pytest.mark.usefixtures("_only_ours")
def test_awq() -> None:
    codes = torch.randint(16, (K, 64))
    zeros, scales = torch.randint(16, (K // 32, 64)), torch.rand(K // 32, 64).add(0.5).bfloat16()
    each = [t.float().repeat_interleave(32, 0) for t in (zeros, scales)]
    values = ((codes.float() - each[0]) * each[1]).t()
    config = AutoAWQConfig(4, 32, True, False)
    layer = RowParallelLinear(
        K, 64, False, params_dtype=torch.bfloat16, quant_config=config, prefix="o"
    )
    check(layer, {"qweight": awq(codes), "qzeros": awq(zeros), "scales": scales}, values, False)


def awq(codes: Tensor) -> Tensor:
    """Eight columns a word, in AWQ's order."""
    columns = codes.view(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    words = (columns.long() << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.usefixtures("_only_ours")
@pytest.mark.parametrize(
    "format", ("int4_g32", "uint4_g32", "int8_g32", "int3_g32", "uint2_g32", "int4")
)
def test_compressed_tensors(tmp_path: Path, format: str) -> None:
    tensors, values = exported(tmp_path, "compressed-tensors", format)
    f = lowbit.quantize(torch.randn(64, K), format).format
    strategy = "channel" if f.group is None else "group"
    scheme = CompressedTensorsWNA16(strategy, f.bits, f.group, f.zero is None, "o")
    layer = nn.Module()
    scheme.create_weights(
        layer, output_size=64, input_size=K, output_partition_sizes=[64], input_size_per_partition=K,
        params_dtype=torch.bfloat16, weight_loader=lambda p, t: p.data.copy_(t),
    )  # fmt: skip
    for name, t in tensors.items():
        layer.get_parameter(name).data.copy_(t)
    scheme.process_weights_after_loading(layer)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    near(scheme.apply_weights(layer, x, None), x, values)


def check(layer: nn.Module, tensors: dict[str, Tensor], values: Tensor, bias: bool) -> None:
    for name, t in tensors.items():
        layer.get_parameter(name).data.copy_(t)
    if bias:
        layer.bias.data.normal_()
    layer.quant_method.process_weights_after_loading(layer)
    assert not any(n in dict(layer.named_parameters()) for n in ("qweight", "scales"))
    x = torch.randn(3, K, dtype=torch.bfloat16)
    near(layer(x)[0] - (layer.bias if bias else 0), x, values)


def near(found: Tensor, x: Tensor, values: Tensor) -> None:
    """Scales of bf16 have 8 bits."""
    want = x.float() @ values.t()
    assert (found.float() - want).abs().max() <= 0.02 * want.abs().max()
