"""What a GGUF file says of a mixture of experts, in the words of transformers; checked against its tensors.

How scores become the weights of experts is in the code of llama.cpp (src/models), and not in the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.integrations.gguf_fused import has
from lowbit.integrations.gguf_keys import key, of_all_layers, unless_zero, want
from lowbit.io.readers.gguf import GGUFFile

_Arguments = dict[str, Any]


def mixtral(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """A llama with experts: their weights add up to 1."""
    _experts(file, arguments, "num_local_experts", arguments["intermediate_size"])


def qwen2moe(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """With an expert that every token has; weights are as the softmax gives them."""
    inside = arguments["intermediate_size"]
    shared = unless_zero(file, "qwen2moe.expert_shared_feed_forward_length", int)
    arguments |= {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": inside if shared is None else shared,
        "qkv_bias": has(file, "blk.0.attn_q.bias"),
    }
    _qwen(file, arguments)


def qwen3moe(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """Weights add up to 1, as in all models of this architecture; transformers' default is that they do not."""
    arguments["norm_topk_prob"] = True
    _qwen(file, arguments)


def _qwen(file: GGUFFile, arguments: _Arguments) -> None:
    arch = file.metadata["general.architecture"]
    name = f"{arch}.expert_feed_forward_length"
    said = file.metadata.get(name, 0)
    if np.isscalar(said) and said == 0:
        used = of_all_layers(file, f"{arch}.expert_used_count", arguments["num_hidden_layers"])
        inside = max(1, arguments["intermediate_size"] // used)
    else:
        inside = of_all_layers(file, name, arguments["num_hidden_layers"])
    arguments["moe_intermediate_size"] = inside
    _experts(file, arguments, "num_experts", inside)


def olmoe(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """Weights are as the softmax gives them."""
    arguments["norm_topk_prob"] = False
    _experts(file, arguments, "num_experts", arguments["intermediate_size"])


def granitemoe(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """Weights are the softmax of the best scores, with or without an expert that every token has."""
    shared = unless_zero(file, "granitemoe.expert_shared_feed_forward_length", int)
    if shared is not None:
        arguments["shared_intermediate_size"] = shared
    _experts(file, arguments, "num_local_experts", arguments["intermediate_size"])


def gpt_oss(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """Weights are the softmax of the best scores; every other layer sees a window."""
    inside = of_all_layers(
        file, "gpt-oss.expert_feed_forward_length", arguments["num_hidden_layers"]
    )
    theta = arguments["rope_parameters"]["rope_theta"]
    for name, expected in (("attention.sliding_window_pattern", 2), ("rope.freq_base_swa", theta)):
        want(file, f"gpt-oss.{name}", expected, expected)
    arguments |= {
        "intermediate_size": inside,
        "sliding_window": key(file, "gpt-oss.attention.sliding_window", int),
        "attention_bias": has(file, "blk.0.attn_q.bias"),
    }
    if arguments["rope_parameters"]["rope_type"] == "yarn":
        # As the model was trained; llama.cpp rounds the ends of the ramp to whole dimensions.
        arguments["rope_parameters"]["truncate"] = False
    _experts(file, arguments, "num_local_experts", inside)


def _experts(file: GGUFFile, arguments: _Arguments, name: str, inside: int) -> None:
    """How many there are, under this name, and how many a token has; the file has as many, of `inside` dimensions."""
    arch = file.metadata["general.architecture"]
    layers = arguments["num_hidden_layers"]
    count = key(file, f"{arch}.expert_count", int)
    used = of_all_layers(file, f"{arch}.expert_used_count", layers)
    if used > count:
        raise ValueError(
            f"{file.path}: {arch}.expert_used_count must be at most {count}, the number of experts, got {used}"
        )
    shape = (count, arguments["hidden_size"], inside)
    for stored in (f"blk.{i}.ffn_down_exps.weight" for i in range(layers)):
        if stored not in file.tensors:
            raise ValueError(f"{file.path}: tensor {stored!r} is missing")
        if file.tensors[stored].shape != shape:
            raise ValueError(
                f"{file.path}: tensor {stored!r} must have shape {shape}, got {file.tensors[stored].shape}"
            )
    arguments |= {name: count, "num_experts_per_tok": used}
