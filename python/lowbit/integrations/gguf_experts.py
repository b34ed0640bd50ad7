"""Experts under the names that llama.cpp's converter gives them: what transformers fuses, apart, each in one tensor of
all experts of a layer.

As conversion/ of llama.cpp, in the source of llama-cpp-python 0.3.36, has it; package `gguf` knows the names that its
classes make, and not what they do to make them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from lowbit.nn.experts import rows_of_halves

_Array = np.ndarray[Any, Any]

# GraniteMoe's gates of the expert that every token has, and what they multiply: one linear there.
SHARED = "shared_mlp.input_linear"
# A linear of a QuantExperts; transformers has one parameter of all, and another one of their biases.
_SPLIT = re.compile(r"(.+\.(?:gate_up|gate|up|down)_proj)\.(\d+)\.(weight|bias)")
_GATE = re.compile(r"(.+)\.gate_proj(|_bias)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
# GraniteMoeModel finds gates in the first half of the rows, and what they multiply in the second; GptOssModel finds
# them by turns. The names are those of other classes: gguf's map has them for all architectures.
_PULLED_APART = {
    "block_sparse_moe.input_linear.weight": ("mlp.experts.{}_proj.weight", False),
    f"{SHARED}.weight": ("mlp.shared_expert.{}_proj.weight", False),
    "mlp.experts.gate_up_proj": ("mlp.experts.{}_proj.weight", True),
    "mlp.experts.gate_up_proj_bias": ("mlp.experts.{}_proj.bias", True),
}
# Of GptOssModel.
_RENAMED = {
    "mlp.experts.down_proj": "mlp.experts.down_proj.weight",
    "mlp.experts.down_proj_bias": "mlp.experts.down_proj.bias",
    "self_attn.sinks": "self_attn.sinks.weight",
}


def experts_together(numbers: Mapping[str, _Array], model: nn.Module) -> dict[str, _Array]:
    """The rows (N,) of the linears of a `QuantExperts` as those (E, N) of the parameter of a model that they are parts
    of; gates that are apart are joined with what they multiply, and so are those of a `JoinedLinear`.
    """
    numbers = dict(numbers)
    for name in [name for name in numbers if name.endswith(f"{SHARED}.0.weight")]:
        stem = name.removesuffix(".0.weight")
        numbers[f"{stem}.weight"] = np.concatenate(
            [numbers.pop(f"{stem}.{i}.weight") for i in range(2)]
        )
    made = _stacked(numbers, _SPLIT, lambda m: m[1] + ("_bias" if m[3] == "bias" else ""))
    for name in [name for name in made if _GATE.fullmatch(name)]:
        experts, bias = _GATE.fullmatch(name).groups()  # type: ignore[union-attr]
        gate, up = made.pop(name), made.pop(f"{experts}.up_proj{bias}")
        joined = np.empty((len(gate), 2 * gate.shape[1]), gate.dtype)
        halves = rows_of_halves(model.get_submodule(experts), joined.shape[1])
        joined[:, halves[0]], joined[:, halves[1]] = gate, up
        made[f"{experts}.gate_up_proj{bias}"] = joined
    return made


def experts_apart(numbers: Mapping[str, _Array]) -> dict[str, _Array]:
    """The rows (N,) of experts with a tensor each as those (E, N) of the tensor that the converter makes of all."""
    return _stacked(numbers, _EXPERT, lambda m: f"{m[1]}.{m[3]}")


def as_converter(numbers: Mapping[str, _Array]) -> dict[str, _Array]:
    """The rows (E, N) or (N,) of a checkpoint's tensors as those of the tensors that the converter makes of them."""
    made = {}
    for name, rows in numbers.items():
        layer, own = _in_layer(name)
        if own not in _PULLED_APART:
            made[layer + _RENAMED.get(own, own)] = rows
            continue
        into, by_turns = _PULLED_APART[own]
        gate, up = (rows[..., ::2], rows[..., 1::2]) if by_turns else np.split(rows, 2, axis=-1)
        made[layer + into.format("gate")], made[layer + into.format("up")] = gate, up
    return made


def _in_layer(name: str) -> tuple[str, str]:
    """The name of a layer with its last point, and of a tensor in it."""
    found = re.match(r".+?\.\d+\.", name)
    end = found.end() if found else 0
    return name[:end], name[end:]


def _stacked(
    numbers: Mapping[str, _Array], pattern: re.Pattern[str], name: Callable[[re.Match[str]], str]
) -> dict[str, _Array]:
    made: dict[str, _Array] = {}
    parts: dict[str, dict[int, _Array]] = {}
    for key, rows in numbers.items():
        found = pattern.fullmatch(key)
        if found is None:
            made[key] = rows
        else:
            parts.setdefault(name(found), {})[int(found[2])] = rows
    made.update({key: np.stack([rows[e] for e in sorted(rows)]) for key, rows in parts.items()})
    return made
