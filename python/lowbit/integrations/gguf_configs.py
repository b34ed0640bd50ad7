"""What a GGUF file says of its model, in the words of transformers, for architectures other than "llama".

Where llama.cpp takes a value from the code of an architecture, and not from the file, it is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from lowbit.files import shown
from lowbit.integrations.configuration import errors_of, quiet
from lowbit.integrations.gguf_keys import (
    check_neutral,
    key,
    of_all_layers,
    rope_parameters,
    token_id,
    unless_zero,
)
from lowbit.io.readers.gguf import GGUFFile

_Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """How the configuration of an architecture is made.

    Attributes:
        config: its class.
        eps: what the class calls the epsilon of the norms.
        partial: whether a part of a head's dimensions may be rotated.
        more: changes the arguments that all have; it is given the file, them, and the dimensions of a head.
    """

    config: type[PreTrainedConfig]
    eps: str = "rms_norm_eps"
    partial: bool = False
    more: Callable[[GGUFFile, _Arguments, int], None] = lambda file, arguments, dim: None


def causal_config(file: GGUFFile) -> PreTrainedConfig:
    """The transformers configuration of a GGUF file, as llama.cpp understands it.

    Raises:
        ValueError: a key or a tensor is missing or out of range.
        NotImplementedError: the architecture is none of these, or the model does something that transformers' does not.
    """
    arch = key(file, "general.architecture", str)
    found = _ARCHITECTURES.get(arch)
    if found is None:
        how = (
            "transformers reads it dense: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), then "
            "lowbit.quantize_model"
            if arch in GGUF_SUPPORTED_ARCHITECTURES
            else "load a folder of transformers with this model instead"
        )
        raise NotImplementedError(
            f"{file.path}: architecture {shown(arch)}; expected one of {sorted(('llama', *_ARCHITECTURES))}: {how}"
        )
    check_neutral(file, arch)
    arguments, dim = _common(file, arch, found)
    found.more(file, arguments, dim)
    with errors_of(f"{file.path}: transformers refuses the configuration"), quiet():
        return found.config(**arguments)


def _common(file: GGUFFile, arch: str, found: _Architecture) -> tuple[_Arguments, int]:
    """What all have, and the dimensions of a head; checked so that what is made of it is no larger than the file."""
    layers = key(file, f"{arch}.block_count", int, most=len(file))
    heads = of_all_layers(file, f"{arch}.attention.head_count", layers)
    kv_heads = of_all_layers(file, f"{arch}.attention.head_count_kv", layers, default=heads)
    if heads % kv_heads:
        raise ValueError(f"{file.path}: {heads} heads cannot share {kv_heads} key heads evenly")
    hidden = key(file, f"{arch}.embedding_length", int)
    dim = key(file, f"{arch}.attention.key_length", int, default=hidden // heads)
    values = key(file, f"{arch}.attention.value_length", int, default=dim)
    if values != dim:
        raise NotImplementedError(
            f"{file.path}: heads have {dim} key and {values} value dimensions; expected as many"
        )
    for name in ("token_embd.weight", *(f"blk.{i}.attn_output.weight" for i in range(layers))):
        if name not in file.tensors:
            raise ValueError(f"{file.path}: tensor {name!r} is missing")
        columns = hidden if name == "token_embd.weight" else heads * dim
        shape = file.tensors[name].shape
        if len(shape) != 2 or shape[1] != columns:
            raise ValueError(
                f"{file.path}: tensor {name!r} must have shape (N, {columns}), got {shape}"
            )
    vocab = file.tensors["token_embd.weight"].shape[0]
    rope = rope_parameters(file, arch)
    rotated = key(file, f"{arch}.rope.dimension_count", int, default=dim)
    if rotated % 2 or rotated > dim or (rotated < dim and not found.partial):
        raise NotImplementedError(
            f"{file.path}: {rotated} of {dim} dimensions of a head are rotated; expected an even number"
            + ("" if found.partial else ", and all")
        )
    if found.partial:
        rope["partial_rotary_factor"] = rotated / dim
        if int(dim * rope["partial_rotary_factor"]) != rotated:
            raise NotImplementedError(
                f"{file.path}: {rotated} of {dim} dimensions of a head are rotated, a part that transformers rounds"
            )
    norm = "layer_norm_rms_epsilon" if found.eps == "rms_norm_eps" else "layer_norm_epsilon"
    arguments = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": of_all_layers(file, f"{arch}.feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": key(file, f"{arch}.context_length", int),
        found.eps: key(file, f"{arch}.attention.{norm}", float),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token_id(file, "bos", vocab),
        "eos_token_id": token_id(file, "eos", vocab),
        "pad_token_id": token_id(file, "padding", vocab),
    }
    # The classes that do not name it read it nevertheless.
    if dim != hidden // heads or "head_dim" in found.config.__dataclass_fields__:
        arguments["head_dim"] = dim
    return arguments, dim


def _phi3(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    kind = arguments["rope_parameters"]["rope_type"]
    if kind != "default":
        raise NotImplementedError(f"{file.path}: rope scaling {kind!r} of a phi3; expected 'none'")
    # llama.cpp leaves the window out and says that results may suffer.
    arguments["sliding_window"] = unless_zero(file, "phi3.attention.sliding_window", int)


def _starcoder2(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    arguments["use_bias"] = "blk.0.attn_output.bias" in file.tensors


def _stablelm(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    if "head_dim" in arguments:
        raise NotImplementedError(
            f"{file.path}: heads of a stablelm have {dim} dimensions; expected "
            f"{arguments['hidden_size']} / {arguments['num_attention_heads']}"
        )
    arguments["use_qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
    arguments["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in file.tensors


def _gemma2(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _gemma(file, arguments, dim, "gemma2", pattern=2, largest=46)
    arguments["sliding_window"] = key(file, "gemma2.attention.sliding_window", int, default=4096)
    for name, default in (("attn", 50.0), ("final", 30.0)):
        full = f"{name}_logit_softcapping"
        arguments[full] = key(file, f"gemma2.{full}", float, default=default)


def _gemma3(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _gemma(file, arguments, dim, "gemma3", pattern=6, largest=62)
    arguments["rope_parameters"] = {
        "full_attention": arguments["rope_parameters"],
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": key(file, "gemma3.rope.freq_base_swa", float, default=10000.0),
        },
    }
    window = unless_zero(file, "gemma3.attention.sliding_window", int)
    if window is None:
        arguments["layer_types"] = ["full_attention"] * arguments["num_hidden_layers"]
    else:
        arguments["sliding_window"] = window
    cap = unless_zero(file, "gemma3.final_logit_softcapping", float)
    arguments["final_logit_softcapping"] = cap


def _gemma(
    file: GGUFFile, arguments: _Arguments, dim: int, arch: str, pattern: int, largest: int
) -> None:
    """The scale of the scores, which is another one in the largest model, and the kinds of layers."""
    layers, heads = arguments["num_hidden_layers"], arguments["num_attention_heads"]
    scaled_by = arguments["hidden_size"] // heads if layers == largest else dim
    arguments["query_pre_attn_scalar"] = scaled_by
    arguments["layer_types"] = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    ]
    name = f"{arch}.attention.sliding_window_pattern"
    said = file.metadata.get(name, pattern)
    if not np.isscalar(said) or said != pattern:
        raise NotImplementedError(f"{file.path}: {name} {shown(said)}; expected {pattern}")


_ARCHITECTURES = {
    "gemma2": _Architecture(config=Gemma2Config, more=_gemma2),
    "gemma3": _Architecture(config=Gemma3TextConfig, more=_gemma3),
    "phi3": _Architecture(config=Phi3Config, partial=True, more=_phi3),
    "qwen2": _Architecture(config=Qwen2Config),
    "qwen3": _Architecture(config=Qwen3Config),
    "stablelm": _Architecture(
        config=StableLmConfig, eps="layer_norm_eps", partial=True, more=_stablelm
    ),
    "starcoder2": _Architecture(config=Starcoder2Config, eps="norm_epsilon", more=_starcoder2),
}
