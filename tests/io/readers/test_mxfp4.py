"""gpt-oss folders: experts stay packed as stored, with the values that transformers itself gives them, and the rest as
it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_folders import check
from folders import save_state, transformers, words
from safetensors.torch import load_file
from test_cli import run, run_json

import lowbit
from lowbit.integrations.load import load_decoded
from lowbit.io.readers.registry import open_checkpoint
from lowbit.nn import QuantExperts
from lowbit.weights.quantized import QuantTensor

EXPERTS = "model.layers.0.mlp.experts"


def gpt_oss(path: Path) -> Any:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
    for name in ("gate_up_proj", "down_proj"):
        full = f"{EXPERTS}.{name}"
        experts, k, n = state.pop(full).shape
        blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, n, k // 32), dtype=torch.uint8)
        state[f"{full}_blocks"], state[f"{full}_scales"] = blocks, scales
        with torch.no_grad():
            decoded = convert(blocks, scales, dtype=torch.float32)
            model.get_parameter(full).copy_(decoded)
    path.mkdir(exist_ok=True)
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    written = {**config.to_dict(), "dtype": "float32", "quantization_config": how}
    written["architectures"] = ["GptOssForCausalLM"]
    (path / "config.json").write_text(json.dumps(written))
    save_state(path, state)
    return model


def test_experts_are_packed_as_stored(tmp_path: Path, recwarn: Any) -> None:
    """Every linear of an expert, its bias too; and nothing else."""
    model = gpt_oss(tmp_path)
    loaded = lowbit.load_model(tmp_path)
    assert not [w for w in recwarn if "lowbit" in str(w.filename)]
    names = check(loaded, model)
    assert names == [f"{EXPERTS}.{x}_proj.{e}" for x in ("gate_up", "down") for e in range(4)]
    for name in names:
        layer = loaded.get_submodule(name)
        assert layer.format.name == "mxfp4"
        stack, _, e = name.rpartition(".")
        assert torch.equal(layer.bias, model.get_parameter(f"{stack}_bias")[int(e)])
    assert type(loaded.model.layers[0].mlp.router) is type(model.model.layers[0].mlp.router)
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert len(check(loaded, theirs)) == 8
    dense = load_decoded(tmp_path)
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in model.state_dict().items())


def test_every_code_and_power_is_as_transformers_has_it(tmp_path: Path) -> None:
    """From 2^-127 on, in bf16, which is what it loads: 6 * 2^125 is the largest that it holds."""
    gpt_oss(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    powers = torch.arange(256).clamp(max=252).to(torch.uint8)
    state[f"{EXPERTS}.gate_up_proj_scales"].view(-1)[:] = powers.repeat(2)
    codes = torch.arange(16, dtype=torch.uint8)
    state[f"{EXPERTS}.gate_up_proj_blocks"][:] = codes | codes.flip(0) << 4
    save_state(tmp_path, state)
    reader = open_checkpoint(tmp_path)
    blocks, scales = (state[f"{EXPERTS}.gate_up_proj_{part}"] for part in ("blocks", "scales"))
    expected = transformers.integrations.mxfp4.convert_moe_packed_tensors(blocks, scales)
    for e in range(4):
        weight = reader.layer(f"{EXPERTS}.gate_up_proj.{e}")
        assert isinstance(weight, QuantTensor)
        assert torch.equal(lowbit.dequantize(weight, torch.bfloat16), expected[e].t())


def test_an_expert_is_read_alone(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    reader = open_checkpoint(tmp_path, mmap=False)
    files = {id(file): file for file in reader._files.values()}
    read: list[int] = []
    for file in files.values():
        file.tensor(next(iter(file.specs)))  # reads the header
        own = file._input.read
        file._input.read = lambda at, count, own=own: read.append(count) or own(at, count)
    mapped = open_checkpoint(tmp_path)
    for name in reader.plans:
        read.clear()
        weight = reader.layer(name)
        assert read == [weight.tensors["codes"].nbytes, weight.tensors["scales"].nbytes]
        for part, t in mapped.layer(name).tensors.items():
            assert torch.equal(t, weight.tensors[part])


@torch.no_grad()
def test_the_commands_take_it(tmp_path: Path, capsys: Any) -> None:
    """What is kept is bit for bit what was loaded; quantized anew it is another format."""
    folder, out = tmp_path / "a", tmp_path / "out"
    model = gpt_oss(folder)
    words(folder)
    rows = {row["name"]: row for row in run_json(capsys, "info", folder)["tensors"]}
    assert rows[f"{EXPERTS}.gate_up_proj"]["format"] == "mxfp4"
    assert rows[f"{EXPERTS}.gate_up_proj"]["shape"] == [4, 64, 64]
    text = run(capsys, "quantize", folder, out, "--quantized", "keep")
    assert "8 layers packed as stored (8 mxfp4)" in text
    first, second = lowbit.load_model(folder), lowbit.load_model(out)
    state = first.state_dict()
    assert second.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in second.state_dict().items())
    assert check(second, model) == check(first, model)
    answers = [
        run_json(capsys, "run", path, "--prompt", "w5 w6", "--max-new-tokens", "3")["text"]
        for path in (folder, out)
    ]
    assert answers[0] == answers[1]
    anew = lowbit.load_model(folder, format="nf4")
    stacks = [m for m in anew.modules() if isinstance(m, QuantExperts)]
    assert {layer.format.name for m in stacks for layer in m} == {"nf4"}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("down_proj_scales", lambda t: t[:, :1], r"proj.0.: scales must have shape \(64, 1\), got \(1, 1\)"),
        ("down_proj_scales", lambda t: t[:3], r"must be of as many experts, got \{'blocks': \(4, 64"),
        ("down_proj_blocks", lambda t: t[:, :0], r"must be of as many experts, got \{'blocks': \(4, 0"),
        ("down_proj_bias", lambda t: t[:3], r"bias' must have shape \(4, 64\), got \(3, 64\)"),
        ("gate_up_proj_bias", lambda t: None, r"lacks tensor '.*gate_up_proj.0.bias'"),
        ("gate_up_proj_scales", lambda t: t.fill_(255), "NaN or inf|e8m0|255"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, part: str, change: Any, message: str) -> None:
    gpt_oss(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    changed = change(state.pop(f"{EXPERTS}.{part}"))
    if changed is not None:
        state[f"{EXPERTS}.{part}"] = changed.contiguous()
    save_state(tmp_path, state)
    with pytest.raises(ValueError, match=message):
        lowbit.load_model(tmp_path)
