"""Extra states of modules (`nn.Module.get_extra_state`) as JSON and tensors; what would not come back as
it was is refused.

JSON stands for itself. {"": "tensor", "index": i} is the i-th tensor of the state, {"": "float", "text": "inf"} a
float that JSON lacks, {"": "dict", "items": {...}} a dict with the key "".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lowbit.files import cut, shown

KEY = "_extra_state"  # in state dicts, after the name of the module
_MAX_DEPTH = 50
_MAX_INT = 2**63
_FLOATS = ("nan", "inf", "-inf")
_TYPES = "dict with str as keys, list, str, int, float, bool, None and Tensor"


def is_extra_state(name: str) -> bool:
    """Whether a name in a state dict is that of an extra state."""
    return name.rpartition(".")[2] == KEY


def encode(name: str, state: object, keep: Callable[[Tensor], int]) -> Any:
    """An extra state as JSON.

    Args:
        name: in the state dict.
        state: dicts with strings as keys, lists, str, int, float, bool, None and tensors.
        keep: takes each tensor and gives its index.

    Raises:
        TypeError: the state holds something else.
        ValueError: it holds itself or lies deeper than 50 levels, an int has more than 64 bits, or a
            str is not Unicode.
    """

    def at(path: str) -> str:
        module = shown(name.rpartition(".")[0])
        where = f" at {cut(path)}" if path else ""
        return f"the extra state of module {module} cannot be saved: it holds{where}"

    def check_text(text: str, path: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"{at(path)} a str that is not Unicode, {shown(text)}") from e

    def walk(value: object, path: str, depth: int) -> Any:
        kind = type(value)
        if depth > _MAX_DEPTH:
            raise ValueError(f"{at(path)} itself, or more than {_MAX_DEPTH} levels")
        if isinstance(value, Tensor):
            return {"": "tensor", "index": keep(value)}
        # Exactly these: a subclass (an enum, torch.Size, numpy's floats) would not come back as one.
        if isinstance(value, float) and kind is float and not math.isfinite(value):
            return {"": "float", "text": str(value)}
        if isinstance(value, int) and kind is int and not -_MAX_INT <= value < _MAX_INT:
            raise ValueError(f"{at(path)} an int of more than 64 bits")
        if isinstance(value, str) and kind is str:
            check_text(value, path)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, list) and kind is list:
            return [walk(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, dict) and kind is dict:
            for key in value:
                if type(key) is not str:
                    raise TypeError(
                        f"{at(path)} a dict with the key {shown(key)}, of type {type(key).__name__}; "
                        f"what can be saved: {_TYPES}"
                    )
                check_text(key, path)
            items = {k: walk(v, f"{path}[{k!r:.50}]", depth + 1) for k, v in value.items()}
            return {"": "dict", "items": items} if "" in value else items
        raise TypeError(
            f"{at(path)} a value of type {_qualified(kind)}; what can be saved: {_TYPES}"
        )

    return walk(state, "", 0)


def _qualified(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return module + kind.__qualname__


def decode(content: object, tensor: Callable[[int], Any]) -> Any:
    """What `encode` was given; `tensor` gives the tensors by their indices.

    Raises:
        ValueError: `encode` gives no such content.
    """

    def walk(value: object, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} levels")
        if isinstance(value, list):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, Mapping):
            if "" not in value:
                return {key: walk(item, depth + 1) for key, item in value.items()}
            match value:
                case {"": "tensor", "index": int(index), **rest} if not rest and index >= 0:
                    return tensor(index)
                case {"": "float", "text": str(text), **rest} if not rest and text in _FLOATS:
                    return float(text)
                case {"": "dict", "items": dict(items), **rest} if not rest:
                    return {key: walk(item, depth + 1) for key, item in items.items()}
            raise ValueError(f"unknown value {shown(value)}")
        return value

    return walk(content, 0)
