"""gpt-oss folders: experts are decoded as transformers does, and the dense rest is taken as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import save_state, transformers
from safetensors.torch import load_file

import lowbit
from lowbit.io.readers.registry import open_checkpoint


def gpt_oss(path: Path):
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
        full = f"model.layers.0.mlp.experts.{name}"
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


def test_experts_are_decoded(tmp_path: Path) -> None:
    model = gpt_oss(tmp_path)
    reader = open_checkpoint(tmp_path)
    assert len(reader.plans) == 2
    for name in reader.plans:
        assert torch.equal(reader.layer(name), model.get_parameter(name))
    with pytest.warns(UserWarning, match="its experts are one tensor of three dimensions"):
        loaded = lowbit.load_model(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_scales_of_other_shapes_are_named(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_state(tmp_path, {**state, name: state[name][:, :1].contiguous()})
    with pytest.raises(ValueError, match=r"scales must have shape \(4, 64, 1\), got \(4, 1, 1\)"):
        open_checkpoint(tmp_path)
