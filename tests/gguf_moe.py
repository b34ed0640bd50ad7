"""Mixtures of experts of transformers as GGUF files, as `gguf_converted`: experts in one tensor, gates apart."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf_converted import (
    FIELDS,
    GRANITE,
    GRANITE_FIELDS,
    KINDS,
    ROPE,
    SIZES,
    Arrays,
    Case,
    permuted,
)


def stacked(arrays: Arrays, config: Any) -> Arrays:
    """Qwen2MoeModel, OlmoeModel, LlamaModel: the experts of a layer are one tensor."""
    done: Arrays = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, a in arrays.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
        if found:
            experts.setdefault(found[1] + found[3], {})[int(found[2])] = a
        else:
            # The converters of before squeezed it.
            done[name] = a[0] if "shared_expert_gate" in name else a
    return done | {n: np.stack([a[e] for e in range(len(a))]) for n, a in experts.items()}


def mixtral(arrays: Arrays, config: Any) -> Arrays:
    return stacked(permuted(arrays, config), config)


def granite(arrays: Arrays, config: Any) -> Arrays:
    """GraniteMoeModel: gates are the first half of a matrix."""
    done: Arrays = {}
    for name, a in permuted(arrays, config).items():
        if name.endswith("input_linear.weight"):
            layer = name.split(".")[2]
            what = "shexp" if "shared_mlp" in name else "exps"
            half = config.shared_intermediate_size if what == "shexp" else config.intermediate_size
            done[f"blk.{layer}.ffn_gate_{what}.weight"] = a[..., :half, :]
            done[f"blk.{layer}.ffn_up_{what}.weight"] = a[..., half:, :]
        else:
            done[name] = a
    return done


def gpt_oss(arrays: Arrays, config: Any) -> Arrays:
    """GptOssModel: transposed, and gates at even places."""
    done: Arrays = {}
    for name, a in arrays.items():
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if "gate_up_proj" in name:
            leaf = "bias" if name.endswith("bias") else "weight"
            rows = a if leaf == "bias" else a.swapaxes(1, 2)
            done[f"blk.{layer}.ffn_gate_exps.{leaf}"] = rows[:, ::2]
            done[f"blk.{layer}.ffn_up_exps.{leaf}"] = rows[:, 1::2]
        elif name.endswith("down_proj"):
            done[f"blk.{layer}.ffn_down_exps.weight"] = a.swapaxes(1, 2)
        elif name.endswith("down_proj_bias"):
            done[f"blk.{layer}.ffn_down_exps.bias"] = a
        else:
            done[name + (".weight" if name.endswith("sinks") else "")] = a
    return {n: np.ascontiguousarray(a) for n, a in done.items()}


_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS = {**FIELDS, "expert_count": 4, "expert_used_count": 2}
_APART = {**_EXPERTS, "expert_feed_forward_length": 32}
_ONE, _ONE_FIELD = {"num_hidden_layers": 1}, {"block_count": 1}
_YARN = {
    "rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN_FIELDS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip
_GPT_OSS_FIELDS = {
    **_EXPERTS, "feed_forward_length": 96, "expert_feed_forward_length": 96, "attention.key_length": 16,
    "attention.value_length": 16, "attention.sliding_window": 5, "rope.dimension_count": None, **_YARN_FIELDS,
}  # fmt: skip
_GPT_OSS = {
    **SIZES,
    **ROPE,
    **_LOCAL,
    "head_dim": 16,
    "sliding_window": 5,
    "rope_parameters": _YARN,
}
MOE = {
    "mixtral": Case("llama", "MixtralForCausalLM", {**SIZES, **ROPE, **_LOCAL}, _EXPERTS, mixtral),
    "qwen2moe": Case(
        "qwen2moe", "Qwen2MoeForCausalLM",
        {**SIZES, **ROPE, **_MANY, **_ONE, "shared_expert_intermediate_size": 64},
        {**_APART, **_ONE_FIELD, "expert_shared_feed_forward_length": 64}, stacked, reads=True,
    ),
    "qwen3moe": Case(
        "qwen3moe", "Qwen3MoeForCausalLM",
        {**SIZES, **ROPE, **_MANY, "head_dim": 32, "norm_topk_prob": True, "tie_word_embeddings": True},
        {**_APART, "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": None},
        stacked, reads=True,
    ),
    "olmoe": Case(
        "olmoe", "OlmoeForCausalLM", {**SIZES, **ROPE, "num_experts": 4, "num_experts_per_tok": 2, **_ONE},
        {**_EXPERTS, **_ONE_FIELD}, stacked,
    ),
    "granitemoe": Case(
        "granitemoe", "GraniteMoeForCausalLM", {**SIZES, **ROPE, **GRANITE, **_LOCAL, **_ONE},
        {**_EXPERTS, **_ONE_FIELD, **GRANITE_FIELDS}, granite,
    ),
    "granitemoe with a shared expert": Case(
        "granitemoe", "GraniteMoeSharedForCausalLM",
        {**SIZES, **ROPE, **GRANITE, **_LOCAL, **_ONE, "shared_intermediate_size": 32},
        {**_EXPERTS, **_ONE_FIELD, **GRANITE_FIELDS, "expert_shared_feed_forward_length": 32}, granite,
    ),
    "gpt-oss": Case("gpt-oss", "GptOssForCausalLM", _GPT_OSS, _GPT_OSS_FIELDS, gpt_oss),
    "gpt-oss, not scaled": Case(
        "gpt-oss", "GptOssForCausalLM", {**_GPT_OSS, **ROPE, **_ONE},
        {**_GPT_OSS_FIELDS, **_ONE_FIELD, **dict.fromkeys(_YARN_FIELDS)}, gpt_oss,
    ),
}  # fmt: skip
# As the files of gpt-oss have them.
MXFP4 = {
    **KINDS,
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), GGMLType.MXFP4),
}
