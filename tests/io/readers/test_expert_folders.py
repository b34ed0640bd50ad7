"""Folders of mixtures of experts that other programs quantized: every expert packed as stored; what transformers makes
of the dense values is the oracle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import test_awq
import test_bitsandbytes
import test_compressed_tensors as ct
import test_fp8
import test_gptq_folders as gptq
import torch
from expert_folders import LAYERS, check, expert, write, write_stacks
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

import lowbit
from lowbit.integrations import folder_names
from lowbit.integrations.load import load_as_stored, load_decoded
from lowbit.io.readers.registry import open_checkpoint
from lowbit.nn import PackedModule, QuantExperts, ReorderedLinear

# Kind, settings, packer, packed linears.
CASES: dict[str, tuple[str, Any, Any, int]] = {
    "gptq, columns in any order": ("Mixtral", gptq.settings(4, 32), gptq.packer(4, 32, index=gptq.shuffled), 16),
    "awq": ("Qwen3Moe", *test_awq.CASES["gemm 4 bits"][:2], 16),
    "fp8": ("DeepseekV3", test_fp8.fp8([48, 48]), test_fp8.packer(48, 48), 20),
    "nvfp4, a scale of each": ("Qwen2Moe", ct.fours("nvfp4", 16), ct.fp4(16), 19),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_experts_are_packed_as_stored(tmp_path: Path, case: str) -> None:
    kind, quantization, pack, count = CASES[case]
    oracle = write(tmp_path / "a", quantization, pack, kind)
    loaded = lowbit.load_model(tmp_path / "a")
    assert type(loaded) is type(oracle)
    assert len(check(loaded, oracle)) == count
    stacks = {n for n, m in loaded.named_modules() if isinstance(m, QuantExperts)}
    assert {n.rpartition(".")[2] for n in stacks} == {"gate_proj", "up_proj", "down_proj"}
    assert not any(p.dim() == 3 for p in loaded.parameters())
    dense = load_decoded(tmp_path / "a")
    state = oracle.state_dict()
    assert dense.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in dense.state_dict().items())


@torch.no_grad()
def test_saved_loaded_and_quantized_anew(tmp_path: Path) -> None:
    """The halves of gate_up_proj, in orders of their own, too."""
    kind, quantization, pack, _ = CASES["gptq, columns in any order"]
    oracle = write(tmp_path / "a", quantization, pack, kind)
    loaded = lowbit.load_model(tmp_path / "a")
    assert isinstance(loaded.model.layers[0].mlp.experts.up_proj[3], ReorderedLinear)
    loaded.save_pretrained(tmp_path / "b")
    lowbit.save(loaded, tmp_path / "c")
    loaded.config.save_pretrained(tmp_path / "c")
    again = [
        type(oracle).from_pretrained(tmp_path / "b"),
        lowbit.load_model(tmp_path / "c"),
        lowbit.load(type(oracle)(oracle.config), tmp_path / "c"),
    ]
    state, ids = loaded.state_dict(), torch.arange(12)[None]
    for model in again:
        found = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], t) for name, t in state.items())
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    again[0].dequantize()
    assert again[0].state_dict().keys() == oracle.state_dict().keys()
    assert torch.equal(again[0](ids).logits, oracle(ids).logits)
    anew = lowbit.load_model(tmp_path / "a", format="int8_g32")
    name = "model.layers.0.mlp.experts.gate_proj.2"
    expected = lowbit.quantize(expert(oracle, name).contiguous(), "int8_g32")
    assert torch.equal(anew.get_submodule(name).weight, expected.dequantize())


def test_some_are_dense_and_the_log_says_so(tmp_path: Path, caplog) -> None:
    """An expert that was left dense, and a router that was quantized."""
    dense = r"(?!.*experts\.1\.)(?!.*self_attn)(.*mlp\.gate\.weight|" + LAYERS + ")"
    settings, pack = ct.grouped(4), ct.integers(4, 32)
    oracle = write(tmp_path / "a", settings, pack, "Qwen3Moe", dense)
    with caplog.at_level("INFO", "lowbit"):
        loaded = lowbit.load_model(tmp_path / "a")
    names = check(loaded, oracle)
    assert {n.rpartition(".")[2] for n in names} == {"0", "2", "3"}
    gate = loaded.model.layers[0].mlp.gate
    assert torch.equal(gate.weight, oracle.model.layers[0].mlp.gate.weight)
    share = sum(m.weight.numel() for m in loaded.modules() if isinstance(m, PackedModule))
    share /= share + sum(p.numel() for p in loaded.parameters())
    pattern = (
        r"9 layers packed .*; 10 dense \(model.layers.0.mlp.gate, .*; "
        rf"{100 * share:.1f} % of the weights are packed"
    )
    assert re.search(pattern, caplog.messages[-1])


@pytest.mark.parametrize("halves", [False, True])
def test_fp8_of_all_experts_in_one_tensor(tmp_path: Path, halves: bool) -> None:
    settings = test_fp8.fp8(None if halves else [48, 48])
    oracle = write_stacks(tmp_path, settings, 48, halves)
    loaded = lowbit.load_model(tmp_path)
    assert len(check(loaded, oracle)) == 8
    rows = {row.name: row for row in open_checkpoint(tmp_path).describe() if row.quantized}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 192, 64)
    assert len(rows) == 2


def test_as_transformers_reads_fp8(tmp_path: Path) -> None:
    """Blocks that divide the weight, which is what it reads right."""
    write(tmp_path / "a", test_fp8.fp8([32, 32]), test_fp8.packer(32, 32), "Qwen3Moe")
    theirs = type(lowbit.load_model(tmp_path / "a")).from_pretrained(tmp_path / "a")
    check(lowbit.load_model(tmp_path / "a"), theirs)


def test_deepseek_v4(tmp_path: Path) -> None:
    """Experts in FP4 and attention in FP8, under the names of its files; transformers' reader is the oracle, too. What
    computes another thing than a linear with its weight stays dense.
    """
    blocks, fours = test_fp8.packer(32, 32, "scale"), test_fp8.fp4("scale")

    def pack(name: str, weight: torch.Tensor) -> Any:
        return (fours if "experts." in name and "shared" not in name else blocks)(name, weight)

    layers = r".*(experts\.\d+\.w\d|attn\.w\w+|shared_experts\.w\d)\.weight"
    settings = test_fp8.fp8([32, 32], scale_fmt="ue8m0", expert_dtype="fp4")
    oracle = write(tmp_path / "a", settings, pack, "DeepseekV4", layers)
    file = tmp_path / "a" / "model.safetensors"
    # As the files have them: without it transformers takes the last norm for another one.
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file)
    theirs = type(oracle).from_pretrained(tmp_path / "a", dtype=torch.float32)
    loaded = lowbit.load_model(tmp_path / "a")
    for model in (oracle, theirs):
        names = check(loaded, model)
    formats = {name: loaded.get_submodule(name).format.name for name in names}
    assert {f for n, f in formats.items() if ".experts." in n} == {"mxfp4"}
    rest = {f for n, f in formats.items() if ".experts." not in n}
    assert rest == {"e4m3_g32_fp32", "e4m3_row_fp32"}
    assert len(names) == 12 + 7
    groups = loaded.model.layers[0].self_attn.o_a_proj
    assert type(groups) is type(oracle.model.layers[0].self_attn.o_a_proj)


def test_fp4_of_all_experts_in_one_tensor(tmp_path: Path) -> None:
    oracle = write_stacks(tmp_path, test_fp8.fp8(expert_dtype="fp4"), 32)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj") and state[name].dim() == 3]:
        made = [test_fp8.fp4("scale")(name, weight) for weight in state[name].float()]
        state[name] = torch.stack([tensors["weight"] for tensors, _ in made])
        state[f"{name}_scale_inv"] = torch.stack([tensors["scale"] for tensors, _ in made])
        oracle.get_parameter(name).data = torch.stack([decoded for _, decoded in made])
    save_file(state, tmp_path / "model.safetensors")
    names = check(lowbit.load_model(tmp_path), oracle)
    assert len(names) == 8


def test_what_no_format_holds_is_dense_with_a_warning(tmp_path: Path) -> None:
    """Groups of unequal columns in one expert; the others are packed."""
    kind, quantization, pack, _ = CASES["gptq, columns in any order"]
    write(tmp_path / "a", quantization, pack, kind)
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.2.w1"
    state[f"{name}.g_idx"][:33] = 0
    save_file(state, file)
    with pytest.warns(
        UserWarning, match=r"holds 1 layers exactly .*: model\S*experts.gate_proj.2;"
    ):
        loaded, found = load_as_stored(tmp_path / "a")
    experts = loaded.model.layers[0].mlp.experts
    assert type(experts.gate_proj[2]) is nn.Linear
    assert len(found.packed) == 15


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("mlp.experts.3.up_proj.", r"lacks 1 tensors: model.layers.0.mlp.experts.up_proj.3.weight"),
        ("mlp.experts.3.down_proj.weight_scale_inv", r"experts.3.down_proj.weight'? is"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, gone: str, message: str) -> None:
    write(tmp_path / "a", test_fp8.fp8([48, 48]), test_fp8.packer(48, 48), "Qwen3Moe")
    file = tmp_path / "a" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if gone not in name}, file)
    with pytest.raises(ValueError, match=message):
        lowbit.load_model(tmp_path / "a")


def test_experts_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", test_fp8.fp8([48, 48]), test_fp8.packer(48, 48), "Qwen3Moe")
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    state |= {n.replace(".3.", ".4."): t for n, t in state.items() if ".3.down_proj" in n}
    state = {name: t.clone() for name, t in state.items()}
    save_file(state, file)
    with pytest.raises(NotImplementedError, match=r"experts.4.down_proj' must be .* no module"):
        lowbit.load_model(tmp_path / "a")


def test_experts_of_bitsandbytes_are_dense(tmp_path: Path) -> None:
    """As transformers 5 writes them: it packs linears alone."""
    settings, pack = test_bitsandbytes.FOUR, test_bitsandbytes.packer()
    oracle = write(tmp_path / "a", settings, pack, "Mixtral", r".*self_attn.*_proj\.weight")
    loaded = lowbit.load_model(tmp_path / "a")
    assert len(check(loaded, oracle)) == 4
    assert loaded.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 192, 64)


def test_experts_that_are_joined_otherwise_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Side by side, which no rows are."""
    write(tmp_path / "a", test_fp8.fp8([48, 48]), test_fp8.packer(48, 48), "Qwen3Moe")
    halves = [f"mlp.experts.*.{half}_proj.weight" for half in ("gate", "up")]
    steps = [MergeModulelist(dim=0), Concatenate(dim=2)]
    other = WeightConverter(halves, "mlp.experts.gate_up_proj", steps)
    monkeypatch.setattr(folder_names, "get_model_conversion_mapping", lambda model: [other])
    with pytest.raises(NotImplementedError, match=r"transformers fuses 'model.layers.0.mlp.exp"):
        lowbit.load_model(tmp_path / "a")
