"""Tiny folders of mixtures of experts as programs that quantize write them, beside the dense ones of their values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from folders import HIDDEN, VOCAB, Packer, save_state, tiny
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.nn import PackedModule, QuantExperts

_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**_MANY, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**_MANY, "head_dim": 16},
    "DeepseekV3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "DeepseekV4": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16,
        "q_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "sliding_window": 8, "hc_mult": 2, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 8, "mlp_layer_types": ["moe"],
        "layer_types": ["sliding_attention"], "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
LAYERS = r".*(experts?|self_attn)\..*_proj(_with_mqa)?\.weight|.*experts\..*\.w\d\.weight"


def config(path: Path, model: Any, quantization: dict[str, Any] | None) -> None:
    written = {**model.config.to_dict(), "dtype": "float32"}
    written["architectures"] = [type(model).__name__]
    if quantization is not None:
        written["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(written))


def write(
    path: Path, quantization: dict[str, Any], pack: Packer, kind: str, layers: str = LAYERS
) -> Any:
    """Writes the folder in the names that transformers gives checkpoints; returns what it makes of the values."""
    torch.manual_seed(0)
    model, plain = tiny(kind, **MODELS[kind]), path.parent / f"{path.name} dense"
    model.save_pretrained(plain)
    stored: dict[str, Tensor] = {}
    values = load_file(plain / "model.safetensors")
    for name, t in list(values.items()):
        if re.fullmatch(layers, name):
            layer = name.removesuffix(".weight")
            tensors, values[name] = pack(layer, t)
            stored |= {f"{layer}.{part}": own.contiguous().clone() for part, own in tensors.items()}
        else:
            stored[name] = t
    path.mkdir(exist_ok=True)
    config(path, model, quantization)
    save_state(path, stored)
    save_state(plain, {name: t.contiguous() for name, t in values.items()})
    return type(model).from_pretrained(plain)


def write_stacks(path: Path, quantization: dict[str, Any], block: int, halves: bool = False) -> Any:
    """FP8 of all experts in one tensor, as transformers' own module has it; scales of blocks or of `halves`."""
    torch.manual_seed(0)
    model = tiny("Qwen3Moe", **MODELS["Qwen3Moe"])
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in [name for name in state if "experts." in name]:
        experts, n, k = state[name].shape
        codes = (state.pop(name) * 1000).to(torch.float8_e4m3fn)
        two = halves and "gate_up" in name
        counts = (1 + two, 1) if halves else (-(-n // block), -(-k // block))
        scales = torch.rand(experts, *counts) * 0.02 + 0.001
        state |= {name: codes, f"{name}_scale_inv": scales}
        rows, columns = (n // counts[0], k) if halves else (block, block)
        each = scales.repeat_interleave(rows, 1)[:, :n].repeat_interleave(columns, 2)[..., :k]
        model.get_parameter(name).data = codes.float() * each
    path.mkdir(exist_ok=True)
    config(path, model, quantization)
    save_state(path, state)
    return model


def expert(model: nn.Module, name: str) -> Tensor:
    """The weight (N, K) of transformers' model that a linear of a `QuantExperts` of this name stands for."""
    parent, key, number = name.rsplit(".", 2)
    module: Any = model.get_submodule(parent)
    half = {"gate_proj": 0, "up_proj": 1}.get(key)
    rows = module.get_parameter(key if half is None else "gate_up_proj").detach()[int(number)]
    rows = rows.t() if module.is_transposed else rows
    return rows if half is None else rows.chunk(2)[half]


@torch.no_grad()
def check(loaded: Any, oracle: Any) -> list[str]:
    """Weights bit for bit, outputs within what other orders of fp32 sums make; the names of packed linears."""
    names = [name for name, m in loaded.named_modules() if isinstance(m, PackedModule)]
    stacks = [name for name, m in loaded.named_modules() if isinstance(m, QuantExperts)]
    for name in names:
        of_expert = name.rpartition(".")[0] in stacks
        want = expert(oracle, name) if of_expert else oracle.get_submodule(name).weight
        assert torch.equal(loaded.get_submodule(name).weight.float(), want.float()), name
    ids = torch.arange(24).reshape(2, 12) % VOCAB
    want, found = oracle(ids).logits, loaded(ids).logits
    # Sums of at most 96 products, in one layer.
    assert (found - want).abs().max() <= 1e-5 * HIDDEN * want.abs().max()
    return names
