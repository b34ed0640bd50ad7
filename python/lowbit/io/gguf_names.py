"""What llama.cpp calls architectures and the matrices of a model, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterable

import gguf

# llama.cpp's name of an architecture, by transformers' model_type.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def tensor_names(model_type: str | None, layers: int, names: Iterable[str]) -> dict[str, str]:
    """The tensor of llama.cpp that holds the weight of each module, by package gguf's map; modules that it does not
    know are left out, and so are all of an architecture that it does not know.

    Args:
        model_type: as in the model's config.json.
        layers: how many the model has.
        names: of modules, with or without the "model." before the layers.

    Example:
        >>> tensor_names("llama", 2, ["model.layers.1.self_attn.q_proj", "other"])
        {'model.layers.1.self_attn.q_proj': 'blk.1.attn_q.weight'}
    """
    arch = _plain(ARCHITECTURES.get(model_type or "", model_type or ""))
    known_names = gguf.MODEL_ARCH_NAMES.items()
    number = next((number for number, name in known_names if _plain(name) == arch), None)
    if number is None:
        return {}
    known = gguf.get_tensor_name_map(number, layers)
    found = {name: known.get_name(name) or known.get_name(f"model.{name}") for name in names}
    return {name: f"{stored}.weight" for name, stored in found.items() if stored is not None}


def _plain(name: str) -> str:
    """Without the marks that the two write differently, as in qwen3_moe and qwen3moe."""
    return name.replace("_", "").replace("-", "")
