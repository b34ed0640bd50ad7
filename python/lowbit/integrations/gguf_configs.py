"""What a GGUF file says of its model, in the words of transformers.

Where llama.cpp takes a value from the code of an architecture, and not from the file, it is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MixtralConfig,
    NomicBertConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from lowbit.files import shown
from lowbit.integrations.configuration import errors_of, quiet
from lowbit.integrations.gguf_expert_configs import (
    gpt_oss,
    granitemoe,
    mixtral,
    olmoe,
    qwen2moe,
    qwen3moe,
)
from lowbit.integrations.gguf_fused import has
from lowbit.integrations.gguf_keys import (
    MOST_POSITIONS,
    check_neutral,
    has_experts,
    key,
    of_all_layers,
    other_way,
    rope_parameters,
    token_id,
    unless_zero,
    want,
)
from lowbit.integrations.gguf_rows import FalconProcessor
from lowbit.io.readers.gguf import GGUFFile

_Arguments = dict[str, Any]
_INSIDE = {
    "intermediate_size", "ffn_hidden_size", "n_inner", "shared_expert_intermediate_size", "shared_intermediate_size",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How the configuration of an architecture is made, and what its files hold.

    Attributes:
        config: its class.
        eps: what the class calls the epsilon of the norms.
        partial: whether a part of a head's dimensions may be rotated.
        more: changes the arguments that all have; it is given the file, them, and the dimensions of a head.
        processor: undoes what llama.cpp's converter does to tensors, as those of transformers do.
        optional: a pattern of tensors that a file may leave out, in all layers alike; they are zero.
        factors: whether the file may hold factors of the rotary embedding's frequencies.
        encoder: whether the model is an encoder, without a head.
        experts: whether it is a mixture of experts.
        yarn: whether its rotary embedding may be scaled by YaRN.
    """

    config: type[PreTrainedConfig]
    eps: str = "rms_norm_eps"
    partial: bool = False
    more: Callable[[GGUFFile, _Arguments, int], None] = lambda file, arguments, dim: None
    processor: type[TensorProcessor] = TensorProcessor
    optional: str = ""
    factors: bool = False
    encoder: bool = False
    experts: bool = False
    yarn: bool = False


def architecture(file: GGUFFile) -> Architecture:
    """That of a GGUF file.

    Raises:
        ValueError: the file names none.
        NotImplementedError: it is none of these.
    """
    arch = key(file, "general.architecture", str)
    if arch not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{file.path}: architecture {shown(arch)}; expected one of {sorted(_ARCHITECTURES)}: "
            f"{other_way(file, arch)}"
        )
    if has_experts(file, arch):
        shared = arch == "granitemoe" and unless_zero(file, _SHARED, int) is not None
        return _WITH_EXPERTS.get(_SHARED if shared else arch, _ARCHITECTURES[arch])
    return _ARCHITECTURES[arch]


def config_of(file: GGUFFile) -> PreTrainedConfig:
    """The transformers configuration of a GGUF file, as llama.cpp understands it.

    Raises:
        ValueError: a key or a tensor is missing or out of range.
        NotImplementedError: the architecture is none of these, or the model does something that transformers' does not.
    """
    found = architecture(file)
    arch = key(file, "general.architecture", str)
    check_neutral(file, arch, causal=not found.encoder, experts=found.experts)
    arguments, dim = _common(file, arch, found)
    found.more(file, arguments, dim)
    # Numbers of rows that no tensor has been compared with yet, of which no more shall be made.
    most = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    for name in arguments.keys() & _INSIDE:
        if arguments[name] > most:
            raise ValueError(
                f"{file.path}: {name} must be at most {most}, the numbers in the file, got {arguments[name]}"
            )
    arguments = {found.config.attribute_map.get(k, k): v for k, v in arguments.items()}
    with errors_of(f"{file.path}: transformers refuses the configuration"), quiet():
        return found.config(**arguments)


def _common(file: GGUFFile, arch: str, found: Architecture) -> tuple[_Arguments, int]:
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
    rope = rope_parameters(file, arch, found.yarn)
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
        "max_position_embeddings": key(file, f"{arch}.context_length", int, most=MOST_POSITIONS),
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


def _glm(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    """Gates are the first half of the rows of `ffn_up`, as of phi3."""
    arch = file.metadata["general.architecture"]
    # Of the part of a GLM-4V or GLM-OCR that reads text.
    for name in ("rope.dimension_sections", "nextn_predict_layers"):
        want(file, f"{arch}.{name}", 0, 0)
    arguments["attention_bias"] = has(file, "blk.0.attn_q.bias")


def _starcoder2(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    arguments["use_bias"] = "blk.0.attn_output.bias" in file.tensors


def _stablelm(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _check_heads(file, arguments, dim)
    arguments["use_qkv_bias"] = has(file, "blk.0.attn_q.bias")
    arguments["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in file.tensors


def _check_heads(file: GGUFFile, arguments: _Arguments, dim: int, shared: bool = True) -> None:
    """Of models whose heads share the width evenly; `shared`: whether several may have the same keys."""
    hidden, heads = arguments["hidden_size"], arguments["num_attention_heads"]
    arch = file.metadata["general.architecture"]
    if hidden != heads * dim:
        raise NotImplementedError(
            f"{file.path}: heads of a {arch} have {dim} dimensions; expected {hidden} / {heads}"
        )
    kv_heads = arguments["num_key_value_heads"]
    if not shared and kv_heads != heads:
        raise NotImplementedError(
            f"{file.path}: a {arch} has {kv_heads} key heads; expected {heads}, as many as heads"
        )


def _llama(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    arguments["attention_bias"] = any(
        has(file, f"blk.0.attn_{x}.bias") for x in ("q", "k", "v", "output")
    )
    arguments["mlp_bias"] = any(
        f"blk.0.ffn_{x}.bias" in file.tensors for x in ("gate", "up", "down")
    )


def _granite(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    arch = file.metadata["general.architecture"]
    _llama(file, arguments, dim)
    want(file, f"{arch}.rope.scaling.finetuned", True, True)
    scale = unless_zero(file, f"{arch}.attention.scale", float)
    arguments["attention_multiplier"] = dim**-0.5 if scale is None else scale
    for name in ("embedding", "residual"):
        scale = unless_zero(file, f"{arch}.{name}_scale", float)
        arguments[f"{name}_multiplier"] = 1.0 if scale is None else scale
    arguments["logits_scaling"] = key(file, f"{arch}.logit_scale", float)


def _granitemoe(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _granite(file, arguments, dim)
    granitemoe(file, arguments, dim)


def _olmo2(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    window = unless_zero(file, "olmo2.attention.sliding_window", int)
    if window is not None:
        raise NotImplementedError(
            f"{file.path}: olmo2.attention.sliding_window {window}, as an Olmo 3 has; expected none: "
            "load a folder of transformers with this model instead"
        )


def _falcon(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _check_heads(file, arguments, dim)
    want(file, "falcon.tensor_data_layout", "jploski", "jploski")
    kv_heads = arguments.pop("num_key_value_heads")
    # One norm for the attention and one for the MLP, of the same input.
    two = "blk.0.attn_norm_2.weight" in file.tensors
    grouped = two or kv_heads > 1
    arguments |= {
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": arguments.pop("intermediate_size"),
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": 2 if two else 1 if grouped else None,
    }


def _gpt2(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _check_heads(file, arguments, dim, shared=False)
    arguments["n_inner"] = arguments.pop("intermediate_size")
    for name in ("num_key_value_heads", "rope_parameters"):
        del arguments[name]


def _bert(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _nomic_bert(file, arguments, dim)
    del arguments["rope_parameters"]


def _nomic_bert(file: GGUFFile, arguments: _Arguments, dim: int) -> None:
    _check_heads(file, arguments, dim, shared=False)
    for name in ("num_key_value_heads", "tie_word_embeddings"):
        del arguments[name]
    kinds = file.tensors.get("token_types.weight")
    arguments["type_vocab_size"] = 1 if kinds is None else kinds.shape[0]


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
    want(file, f"{arch}.attention.sliding_window_pattern", pattern, pattern)


# As in the converter's class of llama, which permutes q and k. Those of SmolLM3, Granite and GraniteMoe inherit from
# it, those of Qwen, Olmo and GptOss do not (conversion/ of llama.cpp, in the source of llama-cpp-python 0.3.36);
# llama.cpp rotates pairs of neighbours of the former, and of the latter halves of a head, as transformers does.
_LIKE_LLAMA: dict[str, Any] = {
    "processor": TENSOR_PROCESSORS["llama"],
    "optional": r"blk\.\d+\..*\.bias",
}
_ENCODER: dict[str, Any] = {
    "eps": "layer_norm_eps",
    "optional": "token_types.weight",
    "encoder": True,
}
_LIKE_GEMMA: dict[str, Any] = {"processor": TENSOR_PROCESSORS["gemma2"]}
_EXPERTS: dict[str, Any] = {"experts": True}
_SHARED = "granitemoe.expert_shared_feed_forward_length"
_ARCHITECTURES = {
    "bert": Architecture(config=BertConfig, more=_bert, **_ENCODER),
    # Their converter leaves heads as they are, and both programs rotate pairs of neighbours.
    "chatglm": Architecture(config=GlmConfig, partial=True, more=_glm),
    "falcon": Architecture(
        config=FalconConfig, eps="layer_norm_epsilon", more=_falcon, processor=FalconProcessor
    ),
    "gemma2": Architecture(config=Gemma2Config, more=_gemma2, **_LIKE_GEMMA),
    "gemma3": Architecture(config=Gemma3TextConfig, more=_gemma3, **_LIKE_GEMMA),
    "glm4": Architecture(config=Glm4Config, partial=True, more=_glm),
    "gpt-oss": Architecture(config=GptOssConfig, more=gpt_oss, yarn=True, **_EXPERTS),
    "gpt2": Architecture(config=GPT2Config, eps="layer_norm_epsilon", more=_gpt2),
    "granite": Architecture(config=GraniteConfig, more=_granite, **_LIKE_LLAMA),
    "granitemoe": Architecture(
        config=GraniteMoeConfig, more=_granitemoe, **_LIKE_LLAMA, **_EXPERTS
    ),
    "llama": Architecture(config=LlamaConfig, more=_llama, factors=True, **_LIKE_LLAMA),
    "nomic-bert": Architecture(config=NomicBertConfig, more=_nomic_bert, **_ENCODER),
    "olmo2": Architecture(config=Olmo2Config, more=_olmo2),
    "olmoe": Architecture(config=OlmoeConfig, more=olmoe, **_EXPERTS),
    "phi3": Architecture(config=Phi3Config, partial=True, more=_phi3),
    "qwen2": Architecture(config=Qwen2Config),
    # Their processors join the tensors of experts, as `sources` does for all, and nothing else.
    "qwen2moe": Architecture(config=Qwen2MoeConfig, more=qwen2moe, **_EXPERTS),
    "qwen3": Architecture(config=Qwen3Config),
    "qwen3moe": Architecture(config=Qwen3MoeConfig, more=qwen3moe, **_EXPERTS),
    "smollm3": Architecture(config=SmolLM3Config, more=_llama, **_LIKE_LLAMA),
    "stablelm": Architecture(
        config=StableLmConfig, eps="layer_norm_eps", partial=True, more=_stablelm
    ),
    "starcoder2": Architecture(config=Starcoder2Config, eps="norm_epsilon", more=_starcoder2),
}
# Of those that have another class with experts, or with one that is shared.
_WITH_EXPERTS = {
    "llama": Architecture(
        config=MixtralConfig, more=mixtral, factors=True, **_LIKE_LLAMA, **_EXPERTS
    ),
    _SHARED: Architecture(
        config=GraniteMoeSharedConfig, more=_granitemoe, **_LIKE_LLAMA, **_EXPERTS
    ),
}
