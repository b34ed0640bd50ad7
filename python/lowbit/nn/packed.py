"""PackedModule: holds one (N, K) weight as operands; the base of QuantLinear and QuantEmbedding.

In memory the weight lies in the layout of its device's kernels; a state dict holds the canonical
tensors of `tensor.py` plus `_extra_state` = {"format", "version", "shape"}. A cast to another dtype
leaves codes, scales, zeros and tables alone; a move to another device converts the layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit import layouts
from lowbit.formats import Format, as_format
from lowbit.layouts import Operands
from lowbit.tensor import TENSOR_NAMES, QuantTensor, tensor_specs

STATE_VERSION = 1
_OPERANDS = ("codes", "scales", "zeros", "table", "outlier_columns", "outlier_values")
# Canonical tensors that the operands alone do not give back (`Operands.second`), and their buffers.
_SECOND = {name: f"second_{name}" for name in ("scales", "scales2", "scales2_offset")}
_BUFFERS = (*_OPERANDS, *_SECOND.values())

# Codes buffer -> the canonical tensors last made from it, so that tied modules put the same tensors
# into a state dict and it shows that they are tied; only while they hold what the module does.
_exports = WeakTensorKeyDictionary()

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

Self = TypeVar("Self", bound="PackedModule")


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def zero_weight(
    format: Format | str, n: int, k: int, device: torch.device | str | None
) -> QuantTensor:
    """A weight of the right shapes whose canonical tensors are all zero; outliers are the first columns.

    Raises:
        ValueError: n or k is below 1.
    """
    if n < 1 or k < 1:
        raise ValueError(f"shape must be positive, got ({n}, {k})")
    f = as_format(format)
    device = torch.get_default_device() if device is None else device
    specs = tensor_specs(f, n, k).items()
    tensors = {name: torch.zeros(s, dtype=dtype, device=device) for name, (s, dtype) in specs}
    if "outlier_columns" in tensors:
        columns = tensors["outlier_columns"]
        columns += torch.arange(columns.shape[1], dtype=columns.dtype, device=device)
    return QuantTensor(f, (n, k), tensors)


class PackedModule(nn.Module):
    """Holds a quantized weight; subclasses compute with it.

    Attributes:
        format: the weight's Format.
        shape: (N, K).
    """

    format: Format
    shape: tuple[int, int]
    _buffers: dict[str, Any]

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        if not isinstance(weight, QuantTensor):
            raise TypeError(f"weight must be a QuantTensor, got {type(weight).__name__}")
        self.format = weight.format
        self.shape = weight.shape
        self._set_specs(weight.format)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self._set_operands(layouts.to_operands(weight))

    def _set_specs(self, format: Format) -> None:
        # Kept: making one takes longer than a small product.
        self._spec, self._spec_without_outliers = format.spec, format.without_outliers.spec

    @property
    def layout(self) -> str:
        """How the buffers lie: the layout of the kernels of their device."""
        return layouts.kernel_layout(self._buffers["codes"].device, self.format)

    def operands(self) -> Operands:
        """The weight as the kernels read it; the tensors are the module's own."""
        return self._make_operands({})

    def _make_operands(self, learned: Mapping[str, Tensor]) -> Operands:
        b = {**self._buffers, **learned}
        specs = tensor_specs(self.format, *self.shape)
        second = {
            name: b[key].view(specs[name][1]) for name, key in _SECOND.items() if b[key] is not None
        }
        operands = {name: b[name] for name in _OPERANDS}
        return Operands(self.format, self.shape, self.layout, **operands, second=second)

    def quant_tensor(self) -> QuantTensor:
        """The weight in canonical layout, bit for bit what the module was made from."""
        return layouts.from_operands(self.operands())

    def share_weight(self, other: PackedModule) -> None:
        """Makes this module hold the weight of `other`, also when that is moved or loaded."""
        if learned := sorted(other._parameters.keys() & set(TENSOR_NAMES)):
            raise ValueError(f"the weight of other must not be learnable, but {learned} are")
        self.format, self.shape = other.format, other.shape
        self._set_specs(other.format)
        # One dict, not two with the same tensors: whichever module is moved or loaded, both see the
        # result, and deepcopy and pickle keep it one.
        self._buffers = other._buffers

    def get_extra_state(self) -> dict[str, object]:
        """What the tensors of a state dict do not say: {"format", "version", "shape"}."""
        return {"format": self._spec, "version": STATE_VERSION, "shape": list(self.shape)}

    def set_extra_state(self, state: Any) -> None:
        """Checks that a state was written by a module of this format and shape.

        Raises:
            ValueError: it was not.
        """
        if not isinstance(state, Mapping) or set(state) != {"format", "version", "shape"}:
            raise ValueError(f"_extra_state must hold format, version and shape, got {state!r}")
        if state["version"] != STATE_VERSION:
            raise ValueError(f"version must be {STATE_VERSION}, got {state['version']!r}")
        if as_format(state["format"]) != self.format:
            raise ValueError(f"format must be {self._spec!r}, got {state['format']!r}")
        if tuple(state["shape"]) != self.shape:
            raise ValueError(f"shape must be {self.shape}, got {tuple(state['shape'])}")

    def extra_repr(self) -> str:
        """Format and bytes."""
        size = sum(t.numel() * t.element_size() for _, t in self._weight_buffers())
        return f"format={self.format.name}, {size} bytes"

    def _weight_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, t) for name in _BUFFERS if (t := self._buffers.get(name)) is not None)

    def _set_operands(self, w: Operands) -> None:
        for name in _OPERANDS:
            if name not in self._parameters:
                self._buffers[name] = getattr(w, name)
        for name, key in _SECOND.items():
            t = w.second.get(name)
            # As bytes: torch can write float8 tensors with pickle but not read them.
            self._buffers[key] = t.view(torch.uint8) if t is not None and _is_float8(t) else t

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        buffers = dict(self._weight_buffers())
        codes = fn(buffers["codes"])
        if codes.device == buffers["codes"].device:
            for name, t in buffers.items():
                self._buffers[name] = codes if name == "codes" else keep_dtype(t)
        else:
            # What comes from the meta device holds no values (`to_empty`), and columns must be some.
            empty = buffers["codes"].is_meta
            weight = (
                zero_weight(self.format, *self.shape, codes.device)
                if empty
                else self.quant_tensor().map(keep_dtype)
            )
            self._set_operands(layouts.to_operands(weight))
        done = {id(t) for _, t in self._weight_buffers()}
        return super()._apply(lambda t: t if id(t) in done else self._apply_other(fn, t), recurse)

    def _apply_other(self, fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        return fn(t)

    def _canonical_tensors(self) -> dict[str, Tensor]:
        codes, tensors = self._buffers["codes"], self.quant_tensor().tensors
        made = {name: reference() for name, reference in _exports.get(codes, {}).items()}
        if made and all(_holds(made[name], t) for name, t in tensors.items()):
            return made
        _exports[codes] = {name: weakref.ref(t) for name, t in tensors.items()}
        return tensors

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, t in self._canonical_tensors().items():
            destination[prefix + name] = t
        for name, parameter in self._parameters.items():
            if parameter is not None and name not in TENSOR_NAMES:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()
        destination[f"{prefix}_extra_state"] = self.get_extra_state()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        specs = tensor_specs(self.format, *self.shape)
        parameters = {
            name: p
            for name, p in self._parameters.items()
            if p is not None and name not in TENSOR_NAMES
        }
        expected = [*specs, *parameters, "_extra_state"]
        missing = [name for name in expected if prefix + name not in state_dict]
        if strict:
            missing_keys += [prefix + name for name in missing]
            unexpected_keys += self._unexpected(state_dict, prefix, expected)
        try:
            if "_extra_state" not in missing:
                self.set_extra_state(state_dict[f"{prefix}_extra_state"])
            if not set(missing) & specs.keys():
                self._load_weight({name: state_dict[prefix + name] for name in specs})
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name in parameters.keys() - set(missing):
            problem = self._load_parameter(name, state_dict[prefix + name], assign)
            if problem:
                error_msgs.append(f"{prefix}{name}: {problem}")

    def _unexpected(
        self, state_dict: Mapping[str, Any], prefix: str, expected: Iterable[str]
    ) -> list[str]:
        names = {key: key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        known = set(expected)
        return [
            key
            for key, name in names.items()
            if name not in known and name.split(".", 1)[0] not in self._modules
        ]

    def _load_weight(self, tensors: dict[str, Tensor]) -> None:
        device = self._buffers["codes"].device
        if any(t.is_meta for t in tensors.values()):
            raise ValueError("the tensors are on the meta device and hold no values")
        weight = QuantTensor(self.format, self.shape, tensors).validate()
        # A module on the meta device takes its device from what it is given.
        weight = weight if device.type == "meta" else weight.to(device)
        self._set_operands(layouts.to_operands(weight.map(_own)))

    def _load_parameter(self, name: str, value: Tensor, assign: bool) -> str | None:
        old = self._parameters[name]
        assert old is not None
        if not isinstance(value, Tensor) or value.shape != old.shape:
            return f"must be a tensor of shape {tuple(old.shape)}, got {value!r:.200}"
        if assign or old.is_meta:
            self._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            with torch.no_grad():
                old.copy_(value)
        return None


def _holds(made: Tensor | None, t: Tensor) -> bool:
    return made is not None and (t.is_meta or same_bits(made, t))


def _is_float8(t: Tensor) -> bool:
    return t.is_floating_point() and t.element_size() == 1


def _own(t: Tensor) -> Tensor:
    return t.detach().clone()
