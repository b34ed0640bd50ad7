"""Keys of a GGUF file's metadata that several architectures have, checked."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, TENSOR_PROCESSORS

from lowbit.files import shown
from lowbit.io.readers.gguf import GGUFFile

T = TypeVar("T")

_CAUSAL = "{}.attention.causal"
# What a file may say and no model here can do: the value that changes nothing.
_NEUTRAL = {
    "general.type": "model",
    "{}.expert_count": 0,
    _CAUSAL: True,
    "{}.rope.scaling.attn_factor": 1.0,
}


def check_neutral(file: GGUFFile, arch: str, causal: bool) -> None:
    """Raises NotImplementedError if the file asks for what no model here can do; `causal`: what the model is."""
    for pattern, neutral in _NEUTRAL.items():
        name = pattern.format(arch)
        value = file.metadata.get(name, neutral)
        expected = causal if pattern is _CAUSAL else neutral
        if not np.isscalar(value) or value != expected:
            way = f": {other_way(file, arch)}" if _has_experts(file, arch) else ""
            raise NotImplementedError(
                f"{file.path}: {name} {shown(value)}; expected {expected!r}{way}"
            )


def other_way(file: GGUFFile, arch: str) -> str:
    """What can be done with a model that cannot be loaded."""
    experts = _has_experts(file, arch)
    # Its reader of models without experts would leave them out.
    readers = TENSOR_PROCESSORS if experts else GGUF_SUPPORTED_ARCHITECTURES
    way = (
        "transformers reads it dense: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), then "
        "lowbit.quantize_model"
        if arch in readers and not (experts and arch == "llama")
        else "load a folder of transformers with this model instead"
    )
    return f"experts are not packed yet; {way}" if experts else way


def _has_experts(file: GGUFFile, arch: str) -> bool:
    count = file.metadata.get(f"{arch}.expert_count", 0)
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


def rope_parameters(file: GGUFFile, arch: str) -> dict[str, Any]:
    """The rotary embedding, in the words of transformers.

    Raises:
        ValueError: a key is out of range.
        NotImplementedError: it is scaled in another way than linearly.
    """
    theta = key(file, f"{arch}.rope.freq_base", float, default=10000.0)
    # As llama.cpp: linear is the default, and a factor of zero is none.
    kind = key(file, f"{arch}.rope.scaling.type", str, default="linear")
    if kind not in ("none", "linear"):
        raise NotImplementedError(
            f"{file.path}: rope scaling {shown(kind)}; expected 'none' or 'linear'"
        )
    name = f"{arch}.rope.scaling.factor"
    if name not in file.metadata:
        name = f"{arch}.rope.scale_linear"
    factor = unless_zero(file, name, float) or 1.0
    if kind == "none" or factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
