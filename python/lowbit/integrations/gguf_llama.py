"""What a GGUF file of architecture "llama" says of its model: transformers' configuration, which
tensors it needs and of which shape, and the rotary embedding. All is checked before a module is
made.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowbit.files import shown
from lowbit.integrations.gguf_keys import (
    check_neutral,
    key,
    of_all_layers,
    rope_parameters,
    token_id,
)
from lowbit.io.readers.gguf import GGUFFile
from lowbit.weights.quantized import QuantTensor

# llama.cpp's names of the tensors of one layer; the keys are transformers'.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ROPE_FACTORS = "rope_freqs.weight"


def llama_config(file: GGUFFile) -> LlamaConfig:
    """The transformers configuration of a GGUF file.

    Raises:
        ValueError: a key is missing or out of range.
        NotImplementedError: the architecture is not "llama", or the model does something that
            LlamaForCausalLM does not.
    """
    arch = key(file, "general.architecture", str)
    if arch != "llama":
        raise NotImplementedError(f"{file.path}: architecture {shown(arch)}; expected 'llama'")
    check_neutral(file, arch)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    layers = key(file, "llama.block_count", int, most=len(file))
    heads = of_all_layers(file, "llama.attention.head_count", layers)
    kv_heads = of_all_layers(file, "llama.attention.head_count_kv", layers, default=heads)
    if heads % kv_heads:
        raise ValueError(f"{file.path}: {heads} heads cannot share {kv_heads} key heads evenly")
    vocab = file.tensors["token_embd.weight"].shape[0]
    hidden = key(file, "llama.embedding_length", int)
    head_dim = key(file, "llama.attention.key_length", int, default=hidden // heads)
    values = key(file, "llama.attention.value_length", int, default=head_dim)
    if values != head_dim:
        raise NotImplementedError(
            f"{file.path}: heads have {head_dim} key and {values} value dimensions; expected as many"
        )
    rotated = key(file, "llama.rope.dimension_count", int, default=head_dim)
    if rotated != head_dim or head_dim % 2:
        raise NotImplementedError(
            f"{file.path}: {rotated} of {head_dim} dimensions of a head are rotated; "
            "expected all, and an even number"
        )
    arguments: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": of_all_layers(file, "llama.feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": key(file, "llama.context_length", int),
        "rms_norm_eps": key(file, "llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope_parameters(file, "llama"),
        "attention_bias": any(
            f"blk.0.attn_{x}.bias" in file.tensors for x in ("q", "k", "v", "output")
        ),
        "mlp_bias": any(f"blk.0.ffn_{x}.bias" in file.tensors for x in ("gate", "up", "down")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token_id(file, "bos", vocab),
        "eos_token_id": token_id(file, "eos", vocab),
        "pad_token_id": token_id(file, "padding", vocab),
    }
    try:
        return LlamaConfig(**arguments)
    # The errors of its checks have no class that all versions share.
    except Exception as e:
        raise ValueError(f"{file.path}: transformers refuses the configuration: {e}") from e


def check_tensors(file: GGUFFile, config: LlamaConfig) -> dict[str, dict[str, str]]:
    """For every module with parameters of its own: its parameters and their names in the file.

    Raises:
        ValueError: a tensor is missing or has another shape.
        NotImplementedError: the file has tensors that the model has not.
    """
    hidden, mlp, dim = config.hidden_size, config.intermediate_size, config.head_dim
    assert dim is not None
    assert config.num_key_value_heads is not None
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config.vocab_size, hidden),
        "output_norm": (hidden,),
        "output": (config.vocab_size, hidden),
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    found: dict[str, dict[str, str]] = {}

    def add(module: str, prefix: str, name: str, leaves: dict[str, tuple[int, ...]]) -> None:
        found[module] = {leaf: f"{prefix}{name}.{leaf}" for leaf in leaves}
        for leaf, shape in leaves.items():
            _check_shape(file, found[module][leaf], shape)

    for module, name in _MODEL_NAMES.items():
        if module != "lm_head" or not config.tie_word_embeddings:
            add(module, "", name, {"weight": shapes[name]})
    for i in range(config.num_hidden_layers):
        for module, name in _LAYER_NAMES.items():
            leaves = {"weight": shapes[name]}
            # All layers are alike.
            if module.endswith("_proj") and f"blk.0.{name}.bias" in file.tensors:
                leaves["bias"] = shapes[name][:1]
            add(f"model.layers.{i}.{module}", f"blk.{i}.", name, leaves)
    known = {stored for leaves in found.values() for stored in leaves.values()}
    if _ROPE_FACTORS in file.tensors:
        _check_shape(file, _ROPE_FACTORS, (dim // 2,))
        known.add(_ROPE_FACTORS)
    if unknown := sorted(file.tensors.keys() - known):
        names = ", ".join(map(shown, unknown[:8]))
        raise NotImplementedError(f"{file.path}: a llama model has no tensors {names}")
    return found


def rotary_embedding(file: GGUFFile, config: LlamaConfig) -> LlamaRotaryEmbedding:
    """The rotary embedding; each frequency divided by its factor if the file has factors, as
    Llama 3.1 has. A state dict then holds the frequencies: no configuration tells them.
    """
    rotary = LlamaRotaryEmbedding(config)
    if _ROPE_FACTORS not in file.tensors:
        return rotary
    factors = file[_ROPE_FACTORS]
    if isinstance(factors, QuantTensor) or not bool((factors > 0).all()):
        raise ValueError(f"{file.path}: tensor {_ROPE_FACTORS!r} must hold positive numbers")
    if not bool((factors == 1).all()):
        scaled = rotary.inv_freq / factors.to(torch.float32)
        del rotary.inv_freq, rotary.original_inv_freq
        rotary.register_buffer("inv_freq", scaled)
        rotary.register_buffer("original_inv_freq", scaled.clone(), persistent=False)
    return rotary


def _check_shape(file: GGUFFile, name: str, shape: tuple[int, ...]) -> None:
    if name not in file.tensors:
        raise ValueError(f"{file.path}: tensor {name!r} is missing")
    if file.tensors[name].shape != shape:
        raise ValueError(
            f"{file.path}: tensor {name!r} must have shape {shape}, got {file.tensors[name].shape}"
        )
