"""What the decoder of csrc/decoder/decoder.h is told of a model: read from transformers' modules and configuration, and
checked. transformers' modeling files of the named architectures are the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.backends.cpu import requests
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear

# Those whose angles depend on nothing but the position, as those of longrope do with one list of factors.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# transformers' names of activations, and those of csrc.
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_SEPARATE = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_FUSED = {**_SEPARATE, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "input_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "out_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


# transformers installs hooks at the first call that asks for hidden states; they do nothing in others.
_CAPTURING = "transformers.utils.output_capturing"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """In what the forward of an architecture differs from llama's.

    Attributes:
        linears: names in a layer, by what they are.
        norms: likewise.
        norm_offset: what is added to the weights of norms, which are then rounded once; None: neither.
        score_cap: whether attention reads `attn_logit_softcapping`.
        window: whether all layers have `sliding_window` ("all"), those of config.layer_types, or none.
    """

    linears: dict[str, tuple[str, ...]] = field(default_factory=lambda: _SEPARATE)
    norms: dict[str, str] = field(default_factory=lambda: _NORMS)
    norm_offset: float | None = None
    score_cap: bool = False
    window: str = "none"


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(),
    "MistralForCausalLM": _Architecture(window="all"),
    "Qwen2ForCausalLM": _Architecture(window="layer_types"),
    "Qwen3ForCausalLM": _Architecture(norms={**_NORMS, **_HEAD_NORMS}, window="layer_types"),
    "SmolLM3ForCausalLM": _Architecture(window="layer_types"),
    "GraniteForCausalLM": _Architecture(),
    "Phi3ForCausalLM": _Architecture(linears=_FUSED, window="all"),
    "GemmaForCausalLM": _Architecture(norm_offset=1.0),
    "Gemma2ForCausalLM": _Architecture(
        norms=_SANDWICH_NORMS, norm_offset=1.0, score_cap=True, window="layer_types"
    ),
    "Gemma3ForCausalLM": _Architecture(
        norms={**_SANDWICH_NORMS, **_HEAD_NORMS}, norm_offset=1.0, window="layer_types"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer: modules by the names of csrc/decoder/decoder.h.

    Attributes:
        linears: "qkv" and "gate_up": one module for each part, or one with the rows of all; "o" and "down": one.
        norms: "input_norm" and "mlp_norm"; "attention_out_norm", "out_norm", "q_norm" and "k_norm" where there are.
        rope: which of `Description.rope_names`, or None.
        window: tokens that a token sees, itself included; 0 means all.
    """

    linears: dict[str, tuple[nn.Module, ...]]
    norms: dict[str, nn.Module]
    rope: str | None
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A decoder, as `DecoderConfig` and `DecoderModel` of csrc/decoder/decoder.h take it.

    Attributes:
        norm_offset: what is added to the weights of norms.
        late_norms: whether norms are rounded once, behind their weights.
        score_scale, score_cap: of attention scores; a cap of 0 is none, here and for the logits.
        rope_names: of the rotary embeddings, for `angles`: kinds of layers, or "" if all have the same.
    """

    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    norm_offset: float
    late_norms: bool
    activation: str
    score_scale: float
    score_cap: float
    embedding_scale: float
    residual_scale: float
    logit_divisor: float
    logit_cap: float
    embedding: nn.Module
    head: nn.Module
    norm: nn.Module
    layers: tuple[Layer, ...]
    rope_names: tuple[str, ...]


def describe(model: PreTrainedModel) -> Description:
    """The description of a model whose layers are packed on the CPU; its embedding and head may be dense.

    Raises:
        NotImplementedError: the model does what the description has no word for; the message says what.
    """
    found = _ARCHITECTURES.get(type(model).__name__)
    if found is None or not type(model).__module__.startswith("transformers.models."):
        raise NotImplementedError(
            f"the model is a {type(model).__name__}, not one of {', '.join(_ARCHITECTURES)}"
        )
    if why := attached(model):
        raise NotImplementedError(why)
    inner: Any = model.model
    config, attention = model.config, inner.layers[0].self_attn
    dtype = inner.norm.weight.dtype
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"its activation is {activation!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise NotImplementedError("its attention is bidirectional")
    for name in ("model", "model.norm", "model.rotary_emb"):
        _want_own(model, name, name)
    layers = tuple(_layer(model, found, i) for i in range(len(inner.layers)))
    rope_type = inner.rotary_emb.rope_type
    types = rope_type if isinstance(rope_type, dict) else {"": rope_type}
    if other := other_rope(model):
        raise NotImplementedError(f"its rotary embedding is {other!r}, not one of {_ROPE_TYPES}")
    described = Description(
        dtype=dtype,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        norm_offset=found.norm_offset or 0.0,
        late_norms=found.norm_offset is not None,
        activation=_ACTIVATIONS[activation],
        score_scale=attention.scaling,
        score_cap=(found.score_cap and config.attn_logit_softcapping) or 0.0,
        embedding_scale=_embedding_scale(inner),
        residual_scale=getattr(inner.layers[0], "residual_multiplier", 1.0),
        logit_divisor=getattr(config, "logits_scaling", 1.0),
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embedding=inner.embed_tokens,
        head=model.get_submodule("lm_head"),
        norm=inner.norm,
        layers=layers,
        rope_names=tuple(types),
    )
    _check(described, found)
    return described


def attached(model: nn.Module) -> str | None:
    """What is attached to modules of a model and only their own calls do: hooks, or a forward that is patched."""
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        what = f"{name or 'the model'}, a {type(module).__name__},"
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return f"{what} has hooks, which it would not call"
        if "forward" in vars(module) and "_hf_hook" not in vars(module):
            return f"{what} has a forward that is patched"
    return None


def other_rope(model: PreTrainedModel) -> str | None:
    """The type of a rotary embedding of a model whose angles depend on more than the position, if there is one."""
    inner: Any = model.model
    kinds, parameters = inner.rotary_emb.rope_type, model.config.rope_parameters
    if not isinstance(kinds, dict):
        kinds, parameters = {"": kinds}, {"": parameters}
    for name, kind in kinds.items():
        found = parameters[name]
        same = kind == "longrope" and found["short_factor"] == found["long_factor"]
        if kind not in _ROPE_TYPES and not same:
            return str(kind)
    return None


def angles(
    model: PreTrainedModel, name: str, max_length: int
) -> tuple[Tensor, Tensor]:  # (max_length, rotary dimensions) fp32, twice
    """cos and sin of a rotary embedding, with the values of the model's dtype."""
    inner: Any = model.model
    positions = torch.arange(max_length, dtype=torch.int64, device="cpu").unsqueeze(0)
    like = torch.empty(0, dtype=inner.norm.weight.dtype, device="cpu")
    cos, sin = inner.rotary_emb(like, positions, *([name] if name else ()))
    return cos[0].float(), sin[0].float()


def _layer(model: PreTrainedModel, architecture: _Architecture, index: int) -> Layer:
    inner: Any = model.model
    config, layer = model.config, inner.layers[index]
    _want_own(model, f"model.layers.{index}", f"layer {index}")
    for name in ("self_attn", "mlp", *architecture.norms.values()):
        _want_own(model, f"model.layers.{index}.{name}", f"{name} of layer {index}")
    window, kind = 0, getattr(config, "layer_types", None)
    if architecture.window == "all" or (
        architecture.window == "layer_types" and kind and kind[index] == "sliding_attention"
    ):
        window = getattr(config, "sliding_window", None) or 0
    rope = kind[index] if isinstance(inner.rotary_emb.rope_type, dict) and kind else ""
    return Layer(
        linears={
            what: tuple(layer.get_submodule(name) for name in names)
            for what, names in architecture.linears.items()
        },
        norms={what: layer.get_submodule(name) for what, name in architecture.norms.items()},
        rope=rope if getattr(layer.self_attn, "use_rope", True) else None,
        window=window,
    )


def _want_own(model: PreTrainedModel, path: str, name: str) -> None:
    part = model.get_submodule(path)
    if type(part).__module__ != type(model).__module__:
        raise NotImplementedError(f"{name} is a {type(part).__name__}, not transformers' own")


def _embedding_scale(inner: Any) -> float:
    """Of what the embedding holds, rounded to the dtype; of a number that the model multiplies by."""
    scale = getattr(inner.embed_tokens, "embed_scale", None)
    if scale is not None:
        return float(torch.tensor(float(scale), dtype=inner.norm.weight.dtype, device="cpu"))
    return float(getattr(inner, "embedding_multiplier", 1.0))


def _check(d: Description, architecture: _Architecture) -> None:
    """Refuses modules that are not plainly packed for the CPU, other dtypes than that of the last norm, and shapes that
    do not follow from the configuration.
    """
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    sizes = {
        "qkv": ((q, kv, kv), d.hidden),
        "o": ((d.hidden,), q),
        "gate_up": ((d.intermediate, d.intermediate), d.hidden),
        "down": ((d.hidden,), d.intermediate),
    }
    for i, layer in enumerate(d.layers):
        for norm in layer.norms.values():
            own = cast("Tensor", norm.weight).dtype
            if own != d.dtype:
                raise NotImplementedError(f"a norm of layer {i} is {own}, the last one {d.dtype}")
        for what, modules in layer.linears.items():
            parts, k = sizes[what]
            rows = parts if len(modules) > 1 else (sum(parts),)
            for name, module, n in zip(architecture.linears[what], modules, rows, strict=True):
                why = _packed_obstacle(module, QuantLinear) or _shape_obstacle(module, n, k)
                if why:
                    raise NotImplementedError(f"{name} of layer {i} {why}")
    for name, outer, packed, dense in (
        ("model.embed_tokens", d.embedding, QuantEmbedding, nn.Embedding),
        ("lm_head", d.head, QuantLinear, nn.Linear),
    ):
        # The one thing that a subclass may do is to scale.
        scaled = hasattr(outer, "embed_scale")
        if isinstance(outer, dense) if scaled else type(outer) is dense:
            weight = cast("Tensor", outer.weight)
            why = None if weight.device.type == "cpu" else f"is on {weight.device}"
            own = weight.dtype
        else:
            why = _packed_obstacle(outer, packed, subclass=scaled)
            own = outer.dtype if isinstance(outer, QuantEmbedding) else d.dtype
        if why is None and own != d.dtype:
            why = f"is {own}, the last norm {d.dtype}"
        why = why or _shape_obstacle(outer, d.vocab, d.hidden)
        if why:
            raise NotImplementedError(f"{name} {why}")
    if len(d.layers[0].linears["gate_up"]) == 1 and d.intermediate % 64:
        raise NotImplementedError(
            f"gate and up are one weight of {d.intermediate} features each, not of multiples of 64"
        )
    if d.head_dim % 2:
        raise NotImplementedError(f"its heads have an odd size, {d.head_dim}")


def _packed_obstacle(
    module: nn.Module, kind: type[PackedModule], subclass: bool = False
) -> str | None:
    if not (isinstance(module, kind) if subclass else type(module) is kind):
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    packed = cast("PackedModule", module)
    if packed.split is not None:
        return f"is not whole: {packed.split}"
    if not requests.reads(packed.layout):
        return f"is in layout {packed.layout!r}, which the CPU's kernels do not read"
    more = packed.format.more_terms
    return f"has {more}" if more else None


def _shape_obstacle(module: nn.Module, n: int, k: int) -> str | None:
    weight = module if isinstance(module, PackedModule) else cast("Tensor", module.weight)
    shape = tuple(weight.shape)
    return None if shape == (n, k) else f"has shape {shape}, not {(n, k)}"
