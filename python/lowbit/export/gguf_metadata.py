"""What a GGUF file says of a model beside its tensors: the numbers of its configuration and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from gguf import GGUFWriter, RopeScalingType, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from lowbit.files import shown
from lowbit.io.gguf_names import ARCHITECTURES

# Of how many layers the last one looks at all tokens, the others at a window.
_PATTERNS = {"gemma2": 2, "gemma3": 6}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before pairs of bytes are merged: llama.cpp's name, by the pattern of package tokenizers.
_SPLITS = {
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
}


def architecture(config: Any) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
        NotImplementedError: it is none that is written, or the model does what llama.cpp's does not.
    """
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise NotImplementedError(
            f"model_type {shown(config.model_type)}; expected one of {sorted(ARCHITECTURES)}: write another "
            "format, or save the model dense and convert it with llama.cpp's own program"
        )
    expected = {
        "use_sliding_window": (False, None),
        "use_bidirectional_attention": (False, None),
        "hidden_act": ("silu",),
        "hidden_activation": ("gelu_pytorch_tanh",),
    }
    if arch == "llama":
        expected["sliding_window"] = (None,)
    for key, allowed in expected.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise NotImplementedError(
                f"{key} {shown(value)} of a {config.model_type}; expected {allowed[0]!r}"
            )
    if arch in _PATTERNS:
        _check_gemma(config, arch)
    return arch


def _check_gemma(config: Any, arch: str) -> None:
    """llama.cpp knows these by the architecture, and no key says that they are others."""
    local = config.rope_parameters.get("sliding_attention", {})
    pattern = _PATTERNS[arch]
    wanted = {
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, config.head_dim),
        "layer_types": (
            config.layer_types,
            [
                "sliding_attention" if (i + 1) % pattern else "full_attention"
                for i in range(config.num_hidden_layers)
            ],
        ),
        "the rope_type of sliding_attention": (local.get("rope_type", "default"), "default"),
        "the rope_theta of sliding_attention": (local.get("rope_theta", 10000.0), 10000.0),
    }
    if arch == "gemma3":
        wanted["final_logit_softcapping"] = (config.final_logit_softcapping, None)
    for key, (value, expected) in wanted.items():
        if value != expected:
            raise NotImplementedError(
                f"{key} {shown(value)} of a {arch}; expected {shown(expected)}"
            )


def rope(config: Any) -> dict[str, Any]:
    """The rope of a model, of its global layers: rope_type "default", "linear", "llama3" or "longrope"
    with one list of factors, and its numbers.

    Raises:
        NotImplementedError: it is of another type.
    """
    found: dict[str, Any] = config.rope_parameters
    found = found.get("full_attention", found)
    kinds = (
        ("default", "linear", "llama3", "longrope")
        if ARCHITECTURES[config.model_type] == "llama"
        else ("default",)
    )
    kind = found.get("rope_type", "default")
    if kind not in kinds:
        raise NotImplementedError(
            f"rope_type {shown(kind)} of a {config.model_type}; expected one of {kinds}"
        )
    if kind == "longrope":
        wanted = (found["short_factor"], 1.0)
        if (found["long_factor"], found.get("attention_factor")) != wanted:
            raise NotImplementedError(
                "rope_type 'longrope' with other factors for long texts or of attention; expected one list"
            )
    return found


def add_config(writer: GGUFWriter, config: Any) -> None:
    """Writes the numbers of a configuration under llama.cpp's keys."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    turns = rope(config)
    writer.add_rope_freq_base(float(turns["rope_theta"]))
    if turns.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(turns["factor"]))
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_quantization_version(2)


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab: int, pre: str | None
) -> None:
    """Writes a tokenizer of byte pairs.

    Args:
        writer: before it writes.
        tokenizer: of transformers, backed by package tokenizers.
        vocab: rows of the embedding; tokens beyond the tokenizer's are unused.
        pre: llama.cpp's name of how text is split; None finds it for the splits of GPT-2, SmolLM, Llama 3 and Qwen 2.

    Raises:
        NotImplementedError: it merges no bytes, or splits text in a way that has no known name.
        ValueError: it has more tokens than the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab)
    if not getattr(tokenizer, "is_fast", False):
        raise NotImplementedError(
            f"the tokenizer is a {type(tokenizer).__name__}; expected one backed by package tokenizers"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    name = _split_of(content) if pre is None else pre
    known = tokenizer.get_vocab()
    if (most := max(known.values(), default=-1)) >= vocab:
        raise ValueError(f"the tokenizer has a token {most}, and the model {vocab} rows")
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [TokenType.UNUSED] * vocab
    for token, i in known.items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i] = added.content
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _split_of(content: dict[str, Any]) -> str:
    split = content.get("pre_tokenizer") or {}
    parts = split.get("pretokenizers", [split])
    kinds = [part.get("type") for part in parts]
    if content["model"].get("type") != "BPE" or kinds[-1] != "ByteLevel":
        raise NotImplementedError(
            f"the tokenizer is a {content['model'].get('type')} after {kinds[-1]}; expected BPE after ByteLevel: "
            "export from the GGUF file of the model, whose tokenizer is copied, or without a tokenizer"
        )
    name = None
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = _SPLITS.get(parts[0]["pattern"].get("Regex"))
    if name is None:
        raise NotImplementedError(
            f"the tokenizer splits text by {shown(json.dumps(parts))}; llama.cpp's name of that is not known here: "
            "say it (pre=, or --pre)"
        )
    return name
