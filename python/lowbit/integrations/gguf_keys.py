"""Keys of a GGUF file's metadata that several architectures have, checked."""

from __future__ import annotations

from typing import Any, TypeVar

import gguf
import numpy as np
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, TENSOR_PROCESSORS

from lowbit.files import shown
from lowbit.io.readers.gguf import GGUFFile

T = TypeVar("T")

# Some models keep a number for each position.
MOST_POSITIONS = 1 << 24

_CAUSAL, _EXPERTS = "{}.attention.causal", "{}.expert_count"
# What a file may say and no model here can do: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    _EXPERTS: (0,),
    _CAUSAL: (True,),
    "{}.rope.scaling.attn_factor": (1.0,),
    # Of 0 or 1 group or step there is but one way; a scale of 0 is none; scores are a softmax.
    "{}.expert_group_count": (0, 1),
    "{}.expert_weights_scale": (1.0, 0.0),
    "{}.expert_gating_func": (gguf.ExpertGatingFuncType.SOFTMAX.value, 0),
    "{}.leading_dense_block_count": (0,),
    "{}.moe_every_n_layers": (0, 1),
    "{}.interleave_moe_layer_step": (0, 1),
}


def check_neutral(file: GGUFFile, arch: str, causal: bool, experts: bool) -> None:
    """Raises NotImplementedError if the file asks for what no model here can do.

    Args:
        file: open.
        arch: its architecture.
        causal, experts: what the model is, and has.
    """
    way = f": {other_way(file, arch)}" if has_experts(file, arch) and not experts else ""
    for pattern, neutral in _NEUTRAL.items():
        if not experts or pattern is not _EXPERTS:
            expected = (causal,) if pattern is _CAUSAL else neutral
            want(file, pattern.format(arch), neutral[0], *expected, way=way)


def want(file: GGUFFile, name: str, default: Any, *expected: Any, way: str = "") -> None:
    """Raises NotImplementedError unless a value of the metadata or the default is expected; `way` ends what it says."""
    value = file.metadata.get(name, default)
    if not np.isscalar(value) or value not in expected:
        raise NotImplementedError(
            f"{file.path}: {name} {shown(value)}; expected {expected[0]!r}{way}"
        )


def other_way(file: GGUFFile, arch: str) -> str:
    """What can be done with a model that cannot be loaded."""
    experts = has_experts(file, arch)
    # Its reader of models without experts would leave them out.
    readers = TENSOR_PROCESSORS if experts else GGUF_SUPPORTED_ARCHITECTURES
    return (
        "transformers reads it dense: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), then "
        "lowbit.quantize_model"
        if arch in readers
        else "load a folder of transformers with this model instead"
    )


def has_experts(file: GGUFFile, arch: str) -> bool:
    """Whether a model is a mixture of experts, as its metadata or its tensors say."""
    count = file.metadata.get(_EXPERTS.format(arch), 0)
    return bool(np.any(count != 0)) or any("_exps." in name for name in file.tensors)


def key(
    file: GGUFFile, name: str, kind: type[T], default: T | None = None, most: int = 2**31 - 1
) -> T:
    """A value of the metadata; ValueError if it is missing, no `kind`, or a number not in (0, most]."""
    return _checked(file, name, file.metadata.get(name, default), kind, most)


def unless_zero(file: GGUFFile, name: str, kind: type[T]) -> T | None:
    """As `key`; None if the key is missing or zero."""
    value = file.metadata.get(name, 0)
    return None if np.isscalar(value) and value == 0 else key(file, name, kind)


def token_id(file: GGUFFile, name: str, vocab: int) -> int | None:
    """The number of a special token, if the file names it; ValueError if it is none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < vocab):
        raise ValueError(f"{file.path}: {key} must be in [0, {vocab}), got {shown(value)}")
    return value


def _checked(file: GGUFFile, name: str, value: object, kind: type[T], most: int = 2**31 - 1) -> T:
    if value is None:
        raise ValueError(f"{file.path}: metadata key {name!r} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{file.path}: metadata key {name!r} must be {kind.__name__}, got {shown(value)}"
        )
    if isinstance(value, int | float) and not 0 < value <= most:
        raise ValueError(f"{file.path}: metadata key {name!r} must be in (0, {most}], got {value}")
    return value


def of_all_layers(file: GGUFFile, name: str, layers: int, default: int | None = None) -> int:
    """A number that a file gives once, or as an array with one for each layer."""
    value = file.metadata.get(name, default)
    if isinstance(value, np.ndarray):
        if len(value) != layers:
            raise ValueError(
                f"{file.path}: metadata key {name!r} must have a number for each of {layers} "
                f"layers, got {len(value)}"
            )
        numbers = np.unique(value)
        if len(numbers) > 1:
            raise NotImplementedError(
                f"{file.path}: {name} differs between layers, {shown(value)}; expected one number"
            )
        value = numbers[0].item()
    return _checked(file, name, value, int)


def rope_parameters(file: GGUFFile, arch: str, yarn: bool = False) -> dict[str, Any]:
    """The rotary embedding, in the words of transformers; `yarn`: whether it may be scaled in this way, too.

    Raises:
        ValueError: a key is out of range.
        NotImplementedError: it is scaled in another way.
    """
    theta = key(file, f"{arch}.rope.freq_base", float, default=10000.0)
    prefix = f"{arch}.rope.scaling"
    # As llama.cpp: linear is the default, and a factor of zero is none.
    kind = key(file, f"{prefix}.type", str, default="linear")
    kinds = ("none", "linear", "yarn") if yarn else ("none", "linear")
    if kind not in kinds:
        raise NotImplementedError(
            f"{file.path}: rope scaling {shown(kind)}; expected {' or '.join(map(repr, kinds))}"
        )
    name = f"{prefix}.factor"
    if name not in file.metadata:
        name = f"{arch}.rope.scale_linear"
    factor = unless_zero(file, name, float) or 1.0
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "linear":
        return found
    for name, neutral in (("ext_factor", 1.0), ("attn_factor", 1.0), ("log_multiplier", 0.0)):
        want(file, f"{prefix}.yarn_{name}", neutral, neutral)
    length = key(file, f"{arch}.context_length", int, most=MOST_POSITIONS)
    return found | {
        "beta_fast": key(file, f"{prefix}.yarn_beta_fast", float, default=32.0),
        "beta_slow": key(file, f"{prefix}.yarn_beta_slow", float, default=1.0),
        "original_max_position_embeddings": key(
            file, f"{prefix}.original_context_length", int, default=length
        ),
    }


def divided(rope: dict[str, Any], factors: list[float], positions: int) -> dict[str, Any]:
    """The rotary embedding whose frequencies are those of `rope`, default or linear, divided by factors: LongRoPE with
    the same ones for short and long texts, and with attention as it is.
    """
    scaled = [factor * rope.get("factor", 1.0) for factor in factors]
    return {
        "rope_type": "longrope",
        "rope_theta": rope["rope_theta"],
        "short_factor": scaled,
        "long_factor": scaled,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }
