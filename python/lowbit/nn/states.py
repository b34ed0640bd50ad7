"""Values of state dicts: checks that name what is wrong, and `_extra_state`, which tensors alone do not say.

`_extra_state` is {"format", "version", "shape"} as JSON in a uint8 tensor (B,), on the CPU. Versions before held the
mapping itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, as_format

VERSION = 1
# Shape and dtype of m.weight of a packed layer m in files that transformers may come across: without lowbit it takes
# such a file for a dense one and would make the weights up, and it refuses a tensor of another shape.
MARKER = ((0,), torch.uint8)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.resolve_neg().view(bits), b.resolve_neg().view(bits))


def holds(made: Tensor | None, t: Tensor) -> bool:
    """Whether a tensor has the bits of `t`, or any if there are none on the meta device."""
    return made is not None and (t.is_meta or same_bits(made, t))


def is_float8(t: Tensor) -> bool:
    """Whether a tensor is of a float dtype of a byte."""
    return t.is_floating_point() and t.element_size() == 1


def is_marker(value: object) -> bool:
    """Whether a value of a state dict is a `MARKER`."""
    return isinstance(value, Tensor) and (tuple(value.shape), value.dtype) == MARKER


def under(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The keys that start with a prefix, without it."""
    return [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless a value of a state dict is a dense tensor with values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {value!r:.200}")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got {value.dtype} in {value.layout}")


def encode(format: Format, shape: tuple[int, int]) -> Tensor:
    """The `_extra_state` of a weight."""
    state = {"format": format.spec, "version": VERSION, "shape": list(shape)}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")


def check(state: Any, format: Format, shape: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless an `_extra_state` is that of a weight of this format and shape."""
    if isinstance(state, Tensor):
        state = _decode(state)
    if not isinstance(state, Mapping) or set(state) != {"format", "version", "shape"}:
        raise ValueError(f"_extra_state must hold format, version and shape, got {state!r:.200}")
    if state["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}, got {state['version']!r}")
    if as_format(state["format"]) != format:
        raise ValueError(f"format must be {format.spec!r}, got {state['format']!r}")
    given = state["shape"]
    given = tuple(given) if isinstance(given, list | tuple) else given
    if given != shape:
        raise ValueError(f"shape must be {shape}, got {given!r:.100}")


def _decode(state: Tensor) -> Any:
    check_tensor("_extra_state", state)
    if state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(
            f"_extra_state must be bytes of JSON, torch.uint8 of shape (B,), got {state.dtype} of shape "
            f"{tuple(state.shape)}"
        )
    raw = bytes(state.tolist())
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ValueError(f"_extra_state must be bytes of JSON, got {raw!r:.200}") from error
