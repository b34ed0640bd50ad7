"""PackedModule: holds one (N, K) weight as operands; the base of QuantLinear and QuantEmbedding.

In memory the weight lies in the layout of its device's kernels; a state dict holds the canonical
tensors of `tensor.py` plus `_extra_state`, {"format", "version", "shape"} as bytes of JSON (uint8): tensors
alone, as writers of state dicts expect. A cast to another dtype leaves codes, scales, zeros and tables alone; a move
to another device converts the layout.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit import layouts
from lowbit.backends import available
from lowbit.forking import alone_after_fork
from lowbit.formats import INTEGER_SCALES, Format, as_format
from lowbit.layouts import Added, KernelWeight, LowRankOperands, LowRankPlan, Operands
from lowbit.layouts.operands import TENSORS
from lowbit.nn import states
from lowbit.nn.split import BYTES, Split
from lowbit.nn.weight import HasPackedWeight
from lowbit.ops import checks
from lowbit.ops.weights import call_dequantize
from lowbit.weights.quantized import (
    FACTOR_TENSORS,
    FACTORS,
    TENSOR_NAMES,
    QuantTensor,
    tensor_specs,
)
from lowbit.weights.sparse import SparseTerm

_SPARSE = ("outlier_columns", "outlier_values")
_OPERANDS = (*TENSORS, *_SPARSE)
# Dense factors of a low-rank term, and the operands of quantized ones.
_LOW_RANK = (*FACTORS, *(f"{factor}_{name}" for factor in FACTORS for name in FACTOR_TENSORS))
# Canonical tensors that the operands alone do not give back (`KernelWeight.second`), and their buffers.
_SECOND = {name: f"second_{name}" for name in ("scales", "scales2", "scales2_offset")}
_BUFFERS = (*_OPERANDS, *_LOW_RANK, *_SECOND.values())

# Codes buffer -> the canonical tensors last made from it, so that tied modules put the same tensors
# into a state dict and it shows that they are tied; only while they hold what the module does.
_exports = WeakTensorKeyDictionary()
# The tensors to multiply to multiply the weight, by the kind of its scales; of other terms it is `_OTHER_FACTORS`.
_FACTORS: dict[str | None, tuple[str, ...]] = {
    None: ("table",),
    "dq8": ("scales2", "scales2_offset"),
    "e4m3": ("scales2",),
    **dict.fromkeys(INTEGER_SCALES, ("scales2", "zeros2")),
    "fp32": ("scales",),
    "fp16": ("scales",),
    "bf16": ("scales",),
}
_OTHER_FACTORS = ("outlier_values", "lowrank_l", "lowrank_l_scales")

Self = TypeVar("Self", bound="PackedModule")


@alone_after_fork
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


class PackedModule(HasPackedWeight):
    """Holds a quantized weight; subclasses compute with it.

    Attributes:
        format: the weight's Format.
        shape: (N, K).
        dtype: that `weight` stands for. It follows `.to(dtype)`, `.half()` and the like; what is stored does not.
        split: what makes the module a part of one that is spread over processes; None if it is whole.
    """

    format: Format
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    _buffers: dict[str, Any]
    # Whether another module has the same dict of buffers.
    _tied = False
    split: Split | None = None
    _low_rank: LowRankPlan | None = None
    # Attributes and buffers of a dense module that this one stands for, and that are not carried over to it.
    takes_over: tuple[str, ...] = ()

    def __init__(self, weight: QuantTensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(weight, QuantTensor):
            raise TypeError(f"weight must be a QuantTensor, got {type(weight).__name__}")
        self.format = weight.format
        self.shape = weight.shape
        self.dtype = dtype or torch.get_default_dtype()
        self._set_specs(weight.format)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self._set_operands(available.kernel_weight(weight))

    def _set_specs(self, format: Format) -> None:
        # Kept: making one takes longer than a small product.
        self._spec = format.matrix.spec
        self._low_rank = LowRankPlan.of(format, *self.shape)

    @property
    def layout(self) -> str:
        """How the buffers lie: the layout of the kernels of their device."""
        return available.kernel_layout(self._buffers["codes"].device, self.format)

    def kernel_weight(self) -> KernelWeight:
        """The weight as the kernels read it; the tensors are the module's own."""
        return self._make_weight(self._learned())

    def _make_weight(self, learned: Mapping[str, Tensor]) -> KernelWeight:
        b = {**self._buffers, **learned}
        specs = tensor_specs(self.format, *self.shape)
        second = {
            name: b[key].view(specs[name][1]) for name, key in _SECOND.items() if b[key] is not None
        }
        w, others = self._terms(b)
        sparse = next((t for t in others if isinstance(t, SparseTerm)), None)
        lowrank = next((t for t in others if isinstance(t, LowRankOperands)), None)
        return KernelWeight(self.format, w, sparse, second, lowrank)

    def _terms(self, b: Mapping[str, Tensor]) -> tuple[Operands, tuple[Added, ...]]:
        """The terms of the weight whose tensors are `b`."""
        # Not self.codes: nn.Module finds a buffer only after three failed look-ups.
        codes, columns = b["codes"], b["outlier_columns"]
        layout = available.kernel_layout(codes.device, self.format)
        w = Operands(
            codes,
            b["scales"],
            b["zeros"],
            b["table"],
            b["scales2"],
            b["zeros2"],
            self._spec,
            layout,
            *self.shape,
        )
        if self._low_rank is not None:
            return w, (self._low_rank.operands(layout, b),)
        return w, () if columns is None else (SparseTerm(columns, b["outlier_values"]),)

    def quant_tensor(self) -> QuantTensor:
        """The weight in canonical layout, bit for bit what the module was made from; learnable tensors are rounded to
        their stored dtype.

        Raises:
            NotImplementedError: the module is one part of several (`split`), which `own_part` gives.
        """
        if self.split is not None:
            raise NotImplementedError(f"the whole weight is not in this process: {self.split}")
        return self.own_part()

    def own_part(self) -> QuantTensor:
        """As `quant_tensor`, of a module that is whole or a part."""
        return layouts.from_kernel(self.kernel_weight())

    @property
    def scales2_offset(self) -> Tensor | None:
        """That of double quantization: torch.distributed.checkpoint looks up every name of a state dict."""
        return self._buffers[_SECOND["scales2_offset"]]  # type: ignore[no-any-return]

    def set_weight(self, weight: QuantTensor) -> None:
        """Takes another weight, of any shape and format, in place of its own, and shares that with no other module."""
        self._buffers, self._tied = dict(self._buffers), False
        self.format, self.shape = weight.format, weight.shape
        self._set_specs(weight.format)
        self._set_operands(available.kernel_weight(weight))
        self._resized()

    def _resized(self) -> None:
        """Brings attributes that say the shape up to date with `shape`."""

    def share_weight(self, other: PackedModule) -> None:
        """Makes this module hold the weight of `other`, also when that is moved or loaded.

        Raises:
            ValueError: the weight of `other` is learnable, or one of the two has buffers of its own.
        """
        if learned := sorted(other._parameters.keys() & set(TENSOR_NAMES)):
            raise ValueError(f"the weight of other must not be learnable, but {learned} are")
        if others := sorted({*self._buffers, *other._buffers}.difference(_BUFFERS)):
            raise ValueError(
                f"modules that share a weight must have no buffers beside it, got {others}"
            )
        self.format, self.shape = other.format, other.shape
        self._set_specs(other.format)
        # One dict, not two with the same tensors: whichever module is moved or loaded, both see the
        # result, and deepcopy and pickle keep it one.
        self._buffers = other._buffers
        self._tied = other._tied = True
        self._resized()

    def shares_weight(self, other: nn.Module) -> bool:
        """Whether `other` holds the very weight of this module."""
        return isinstance(other, PackedModule) and other._buffers is self._buffers

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # save_pretrained of transformers writes what tied modules share once if they name it so.
        return {name: name for name in TENSOR_NAMES} if self._tied else {}

    def weight_spec(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        return self.shape, self.dtype, self._buffers["codes"].device

    def weight_source(self) -> Callable[[], Tensor]:
        """What dequantizes the weight of this moment."""
        w, others = self._terms({**self._buffers, **self._learned()})
        dtype = self.dtype
        computed = dtype if dtype in checks.FLOAT_DTYPES else torch.float32
        return lambda: call_dequantize(w, computed, *others).to(dtype)

    def _learned(self) -> dict[str, Tensor]:
        """What is learnable of the weight, as the kernels read it."""
        return {}

    def learnable_parts(self) -> list[str]:
        """The tensors of the packed weight that require grad."""
        named = self._parameters.items()
        return [n for n, p in named if n in TENSOR_NAMES and p is not None and p.requires_grad]

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype that `weight` stands for."""
        self.dtype = dtype

    @torch.no_grad()
    def scale_weight(self, factor: float) -> None:
        """Multiplies the weight, and that of modules tied to it, by a factor.

        Raises:
            NotImplementedError: the result is not exact in this format, or the weight is learnable.
        """
        if factor == 1:
            return
        qt = self.own_part()
        scaled = {*_FACTORS.get(self.format.scale, ()), *_OTHER_FACTORS}
        if self.format.zero == "min" and not self.format.integer_scales:
            scaled.add("zeros")
        tensors = {
            name: (t * factor).to(t.dtype) if name in scaled else t
            for name, t in qt.tensors.items()
        }
        made = QuantTensor(self.format, self.shape, tensors)
        learned = self._parameters.keys() & set(TENSOR_NAMES)
        if (
            learned
            or not math.isfinite(factor)
            or not torch.equal(made.dequantize(), qt.dequantize() * factor)
        ):
            raise NotImplementedError(
                f"a weight in format {self.format.name!r} cannot be multiplied by {factor} in place: "
                + (f"its {sorted(learned)} are learnable" if learned else "the result is not exact")
            )
        self._set_operands(available.kernel_weight(made))

    def get_extra_state(self) -> Tensor:
        """What the tensors of a state dict do not say: {"format", "version", "shape"}, as bytes of JSON."""
        return states.encode(self.format, self.shape)

    def set_extra_state(self, state: Any) -> None:
        """Checks that a state was written by a module of this format and shape.

        Args:
            state: as `get_extra_state` gives it, or the mapping itself, as versions before gave it.

        Raises:
            ValueError: it was not.
        """
        states.check(state, self.format, self.shape)

    def extra_repr(self) -> str:
        """Format and bytes."""
        size = sum(t.numel() * t.element_size() for _, t in self._weight_buffers())
        return f"format={self.format.name}, {size} bytes"

    def _weight_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, t) for name in _BUFFERS if (t := self._buffers.get(name)) is not None)

    def _set_operands(self, w: KernelWeight) -> None:
        sparse = (None, None) if w.sparse is None else w.sparse
        tensors = (*w.operands.tensors, *sparse)
        named = dict(zip(_OPERANDS, tensors, strict=True)) | dict.fromkeys(_LOW_RANK)
        if w.lowrank is not None:
            named |= layouts.low_rank_tensors(w.lowrank)
        for name, t in named.items():
            if name not in self._parameters:
                self._buffers[name] = t
        for name, key in _SECOND.items():
            t = w.second.get(name)
            # As bytes: torch can write float8 tensors with pickle but not read them.
            self._buffers[key] = t.view(torch.uint8) if t is not None and states.is_float8(t) else t

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
                else self.own_part().map(keep_dtype)
            )
            self._set_operands(available.kernel_weight(weight))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=codes.device)).dtype
        done = {id(t) for _, t in self._weight_buffers()}
        return super()._apply(lambda t: t if id(t) in done else self._apply_other(fn, t), recurse)

    def _apply_other(self, fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        return fn(t)

    def _canonical_tensors(self) -> dict[str, Tensor]:
        codes, tensors = self._buffers["codes"], self.own_part().tensors
        made = {name: reference() for name, reference in _exports.get(codes, {}).items()}
        if made and all(states.holds(made[name], t) for name, t in tensors.items()):
            return made
        _exports[codes] = {name: weakref.ref(t) for name, t in tensors.items()}
        return tensors

    def other_tensors(self) -> dict[str, Tensor]:
        """What a state dict holds beside the weight: parameters and persistent buffers, by name."""
        others = {n: p for n, p in self._parameters.items() if n not in (*TENSOR_NAMES, BYTES)}
        for name, t in self._buffers.items():
            if name not in _BUFFERS and name not in self._non_persistent_buffers_set:
                others[name] = t
        return {name: t for name, t in others.items() if t is not None}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, t in self._canonical_tensors().items():
            destination[prefix + name] = t
        for name, t in self.other_tensors().items():
            destination[prefix + name] = t if keep_vars else t.detach()
        destination[f"{prefix}_extra_state"] = self.get_extra_state()
        if self.split is not None:
            self.split.save(self, destination, prefix)

    @alone_after_fork
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
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *arguments)
        loaded: Collection[str] = ()
        if self.split is not None:
            try:
                state_dict, loaded = self.split.load(self, state_dict, prefix)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
        specs = {n: s for n, s in tensor_specs(self.format, *self.shape).items() if n not in loaded}
        others = self.other_tensors()
        others.update(self._made_by_loading(states.under(state_dict, prefix)))
        expected = [*specs, *others, "_extra_state"]
        given = {
            name: state_dict[prefix + name] for name in expected if prefix + name in state_dict
        }
        if strict:
            missing_keys += [prefix + name for name in expected if name not in given]
            unexpected_keys += self._unexpected(state_dict, prefix, expected)
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            store = self._prepare(given, specs.keys(), others, assign)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        else:
            store()

    def _prepare(
        self,
        given: dict[str, Any],
        names: Collection[str],
        others: Mapping[str, Tensor],
        assign: bool,
    ) -> Callable[[], None]:
        """Checks everything that is given and gives back what stores it, which does not fail.

        Raises:
            TypeError, ValueError: naming the tensor, the value and what was expected.
        """
        if "_extra_state" in given:
            self.set_extra_state(given.pop("_extra_state"))
        for name, value in given.items():
            states.check_tensor(name, value)
        weight = None
        device = self._buffers["codes"].device
        if names and not names - given.keys():
            tensors = {n: given[n] for n in names}
            weight = QuantTensor.from_file(self.format, self.shape, tensors).validate()
            # A module on the meta device takes its device from what it is given.
            device = weight.device if assign or device.type == "meta" else device
            weight = weight.to(device).map(_own)
        values = {
            name: self._other_value(name, old, given[name], device, assign)
            for name, old in others.items()
            if name in given
        }
        operands = None if weight is None else available.kernel_weight(weight)

        def store() -> None:
            if weight is not None and operands is not None:
                self._set_operands(operands)
                self._set_learned(weight)
            for name, value in values.items():
                self._store_other(name, value, assign)

        return store

    def _set_learned(self, weight: QuantTensor) -> None:
        """Brings what is learnable of the weight up to date with one that was loaded."""

    def _made_by_loading(self, names: Collection[str]) -> dict[str, Tensor]:
        """What `other_tensors` lacks and a state dict with these names makes."""
        return {}

    def _other_value(
        self, name: str, old: Tensor, value: Tensor, device: torch.device, assign: bool
    ) -> Tensor:
        """What `_store_other` takes of a tensor, checked."""
        if value.shape != old.shape:
            raise ValueError(f"{name} must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
        if not (assign or old.is_meta):
            return value.detach().to(old.device, old.dtype, copy=True)
        floats = checks.FLOAT_DTYPES if old.dtype in checks.FLOAT_DTYPES else (old.dtype,)
        if value.dtype not in floats or value.device != device:
            wanted = " or ".join(map(str, floats))
            raise ValueError(
                f"{name} must be {wanted} on {device}, got {value.dtype} on {value.device}"
            )
        return value.detach()

    def _store_other(self, name: str, value: Tensor, assign: bool) -> None:
        members = self._parameters if name in self._parameters else self._buffers
        old = members[name]
        assert old is not None
        if not (assign or old.is_meta):
            with torch.no_grad():
                old.copy_(value)
        elif members is self._buffers:
            self._buffers[name] = value
        else:
            self._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)

    def _unexpected(
        self, state_dict: Mapping[str, Any], prefix: str, expected: Iterable[str]
    ) -> list[str]:
        known = set(expected)
        return [
            prefix + name
            for name in states.under(state_dict, prefix)
            if name not in known and name.split(".", 1)[0] not in self._modules
            # Of a file that `save_pretrained` wrote.
            if not (name == "weight" and states.is_marker(state_dict[prefix + name]))
        ]


def _own(t: Tensor) -> Tensor:
    return t.detach().clone()
