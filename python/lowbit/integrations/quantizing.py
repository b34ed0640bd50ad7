"""What happens to a model of transformers in a quantized `from_pretrained`, and what `save_pretrained` writes."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from lowbit.files import cut, shown
from lowbit.formats import Format
from lowbit.integrations.dense import dense_of
from lowbit.integrations.pretrained import put, unhooked
from lowbit.io.match import DENSE_KINDS
from lowbit.io.native import prefix_of
from lowbit.io.readers.native import NativeReader
from lowbit.io.safetensors_file import Specs
from lowbit.io.save_load import checkpoint_state
from lowbit.methods.grid import check_weight
from lowbit.nn import (
    PackedModule,
    QuantConv,
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    ReorderedLinear,
)
from lowbit.nn.conv import CONVOLUTIONS, matrix_of, packed_conv
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.names import Rule, Selection
from lowbit.nn.product import PackedProduct
from lowbit.nn.stand_ins import Form, dense_forms, put_stand_ins, stand_ins, take_away
from lowbit.nn.surgery import replace
from lowbit.nn.weight import HasPackedWeight
from lowbit.ptq.convolutions import fitting
from lowbit.ptq.model import Method, check_rules
from lowbit.ptq.plan import plan_layers
from lowbit.ptq.report import Report
from lowbit.weights.quantized import TENSOR_NAMES, QuantTensor

_SHOWN = 8


class Job(ABC):
    """One call of `from_pretrained`, from the empty model to the loaded one."""

    def quantizes(self, name: str) -> bool:
        """Whether this tensor of a dense checkpoint is quantized as it is read."""
        return False

    def operation(self) -> ConversionOps:
        """What quantizes it."""
        raise NotImplementedError("nothing is quantized on load")

    @abstractmethod
    def layers(self) -> set[str]:
        """Names of layers that will be packed, and of what holds their weights."""

    @abstractmethod
    def finish(self) -> None:
        """Puts the packed modules in their places, when all tensors are read."""


class OnLoad(Job):
    """Quantizes a dense checkpoint, a tensor at a time, as `lowbit.quantize_model` does a model.

    What transformers makes up because the checkpoint lacks it (a new head) stays dense.

    Raises:
        TypeError, ValueError: as `quantize_model`; the first of weights that cannot be quantized is
            named by `finish`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selection: Selection,
        method: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self._model = model
        # `model.tie_weights` does nothing while transformers makes a model.
        for name, first in model.all_tied_weights_keys.items():
            module, key = model.get_submodule(_owner(name)), name.rpartition(".")[2]
            setattr(module, key, model.get_parameter(first))
        with stand_ins(model) as forms:
            found = plan_layers(model, selection, Report(), stacklevel=5)
            self._plan = {}
            for names, (rule, weight) in found.items():
                completed, module = rule.completed(method, options), model.get_submodule(names[0])
                self._plan[names] = fitting(module, completed, False)[0], weight
        check_rules([rule for rule, _ in self._plan.values()], False)
        self._forms = forms
        parts: dict[str, list[tuple[str, Rule, Any]]] = {}
        # What the model shares is one tensor of the checkpoint, and may have several formats.
        shared: dict[int, list[tuple[str, Rule, Any]]] = {}
        for names, (rule, weight) in self._plan.items():
            for name in names:
                part = name, rule, (weight, rule.format)
                parts.setdefault(self._tensor(name), []).append(part)
        for each in parts.values():
            shared.setdefault(each[0][2][0], []).extend(each)
        # A weight that something else has too must be there when that is tied to it.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        dense = {id(p) for name, p in parameters.items() if name not in parts}
        # Of experts in one tensor all or none.
        self._taken = {
            name: shared[each[0][2][0]]
            for name, each in parts.items()
            if id(parameters[name]) not in dense
            and (self._form(each[0][0]).expert is None or len(each) == len(parameters[name]))
        }
        self._made: dict[Any, tuple[QuantTensor, torch.dtype]] = {}
        self._errors: list[Exception] = []

    def quantizes(self, name: str) -> bool:
        """By the plan."""
        return name in self._taken

    def layers(self) -> set[str]:
        """By the plan."""
        names = {name for each in self._plan for name in each}
        fused = {_owner(name) for name in names if self._form(name).expert is not None}
        return names | fused | {_owner(name) for name in fused}

    def operation(self) -> ConversionOps:
        """One for every tensor."""
        return _Take(self)

    def _form(self, name: str) -> Form:
        return self._forms.get(name, Form(False))

    def _tensor(self, name: str) -> str:
        """The tensor that holds the weight of a layer."""
        return f"{name}.weight" if self._form(name).expert is None else _owner(name)

    def take(self, tensor: str, stored: Tensor) -> None:
        """Quantizes what is stored as one tensor; the dense values are not kept."""
        for name, rule, key in self._taken[tensor]:
            if key not in self._made:
                try:
                    self._quantize(rule, key, self._matrix(name, stored))
                except (TypeError, ValueError) as e:
                    self._errors.append(type(e)(f"{name}: {e}"))

    def _matrix(self, name: str, stored: Tensor) -> Tensor:
        if name in self._forms:
            return self._forms[name].linear(stored)
        return matrix_of(self._model.get_submodule(name), stored)

    def _quantize(self, rule: Rule, key: Any, weight: Tensor) -> None:
        values = weight.detach()
        check_weight(values, rule.format.matrix)  # type: ignore[union-attr]
        self._made[key] = Method(rule, None)(None, values.contiguous()), weight.dtype

    def finish(self) -> None:
        """Raises what the first weight that cannot be quantized raised."""
        if self._errors:
            raise self._errors[0]
        modules = dict(self._model.named_modules())
        for name in self.layers() & modules.keys():
            unhooked(modules[name])
        packed: dict[Any, PackedModule] = {}
        tensors = {name: self._model.get_parameter(self._tensor(name)) for name, *_ in self._plan}
        read = {name for name, t in tensors.items() if getattr(t, "_is_hf_initialized", False)}
        put_stand_ins(self._model, {name for names in self._plan for name in names})
        for names, (rule, identity) in self._plan.items():
            key = identity, rule.format
            dense: Any = self._model.get_submodule(names[0])
            if key not in self._made:
                if names[0] not in read:
                    continue
                self._quantize(rule, key, matrix_of(dense))
            weight, dtype = self._made[key]
            made = _packed(dense, weight, packed.get(key), dense._parameters.get("bias"))
            packed.setdefault(key, made)
            replace(self._model, names, made)
            made.set_weight_dtype(dtype)  # after `replace`, which takes that of the empty module
        self._made.clear()
        take_away(self._model)
        if meta := [name for name, p in self._model.named_parameters() if p.is_meta]:
            raise ValueError(f"the checkpoint lacks {_list(meta)}")


class _Take(ConversionOps):  # type: ignore[misc]
    """Hands tensors of a dense checkpoint to the job that quantizes them."""

    def __init__(self, job: OnLoad) -> None:
        self._job = job

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tensors that are not quantized."""
        left = {}
        for name, value in input_dict.items():
            if self._job.quantizes(name):
                self._job.take(name, value[0] if isinstance(value, list) else value)
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                left[name] = value
        return left


class _Slot(HasPackedWeight):
    """Where a packed module will be: its canonical tensors while transformers reads them, or none if
    it shares those of another one.
    """

    dtype: torch.dtype
    shape: tuple[int, int]

    def __init__(self, dense: Any, format: Format | None, specs: Specs) -> None:
        super().__init__()
        self.dense, self.format = (dense,), format  # a tuple: no child
        self.dtype, self.shape = dense.weight.dtype, tuple(matrix_of(dense).shape)  # type: ignore[assignment]
        self.specs = specs
        for name, (shape, dtype) in specs.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", dense._parameters.get("bias"))

    def weight_spec(self) -> tuple[Sequence[int], torch.dtype, torch.device]:
        """Of a weight without values."""
        return self.shape, self.dtype, torch.device("meta")

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype of `weight`."""
        self.dtype = dtype

    def learnable_parts(self) -> list[str]:
        """None."""
        return []

    def packed(self, first: PackedModule | None) -> PackedModule:
        """The module, of the tensors that were read or of those of `first`."""
        if first is not None:
            return _packed(self.dense[0], None, first, self._parameters["bias"])
        assert self.format is not None
        # Models keep some layers in fp32, by their names: their scales come back to their own dtype.
        tensors = {name: self._buffers[name].to(dtype) for name, (_, dtype) in self.specs.items()}  # type: ignore[union-attr]
        weight = QuantTensor.from_file(self.format, self.shape, tensors).validate()
        order = self._parameters.get("input_order")
        made = _packed(self.dense[0], weight, None, self._parameters["bias"], order)
        if (scale := self._parameters.get("input_scale")) is not None:
            assert isinstance(made, PackedProduct)
            made.set_input_scale(scale)
        return made

    @property
    def own(self) -> list[str]:
        """What does not move on to the packed module."""
        own = ["dense", "format", "specs", "dtype", "shape", "input_order", "input_scale"]
        return [*own, *TENSOR_NAMES]


class Stored(Job):
    """Loads a checkpoint of lowbit: transformers reads the canonical tensors by their names.

    Layers that the model lacks, and tensors that the checkpoint lacks, are errors if the model is of
    the class that was saved; else they are what transformers makes of them: a head that is not
    used, or one that is made up.

    Args:
        model: empty, on the meta device.
        dtype: of what is dense.
        files: those of the checkpoint.

    Raises:
        ValueError: as `lowbit.load`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, files: list[str] | None) -> None:
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise ValueError(
                f"a checkpoint of lowbit must be .safetensors files, got {files or 'a state dict'}"
            )
        self._model = model
        self._path = Path(files[0] if len(files) == 1 else Path(files[0]).parent)
        self._reader = NativeReader(self._path)
        header, self._dense = self._reader.header, self._reader.dense
        named = (*header.layers, *header.tied)
        put_stand_ins(model, {other for name in named for other in self._names(name)})
        self._modules = dict(model.named_modules(remove_duplicate=False))
        layers = {self._name(name): how for name, how in header.layers.items()}
        stored = {self._name(name): name for name in header.layers}
        tied = {
            self._name(name): self._name(first)
            for name, first in header.tied.items()
            if first in header.layers
        }
        self._tied = {**tied, **self._tied_by_model(layers)}
        saved = type(model).__name__ in (model.config.architectures or ())
        if saved and (lost := [stored[n] for n in layers if n not in self._modules]):
            raise ValueError(f"{self._path}: the model has no layers {_list(lost)}")
        self._slots: dict[str, _Slot] = {}
        self._dtypes = model._get_dtype_plan(dtype)
        for name, (format, shape) in layers.items():
            self._put(name, format, shape, stored[name])
        for name, first in self._tied.items():
            self._put(name, None, layers[first][1], name)
        take_away(model)
        self._all_ties = dict(model.all_tied_weights_keys)
        ties = {
            n: f for n, f in self._all_ties.items() if not {_owner(n), _owner(f)} & {*self._slots}
        }
        model.all_tied_weights_keys = ties
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        if beside := self._reader.beside:
            known = {rf"(^|\.){re.escape(self._tensor(name))}$" for name in beside}
            model._keys_to_ignore_on_load_unexpected = {*(self._unexpected or ()), *known}
        if saved:
            self._check_dense()

    def _name(self, name: str) -> str:
        """The model's name of what the checkpoint calls `name`, with or without the prefix of a head's base."""
        return next((n for n in self._names(name) if n in self._modules), name)

    def _names(self, name: str) -> tuple[str, str, str]:
        prefix = f"{self._model.base_model_prefix}."
        return name, name.removeprefix(prefix), prefix + name

    def _tied_by_model(self, layers: Iterable[str]) -> dict[str, str]:
        """Modules that the model ties to a layer and that the checkpoint does not mention."""
        found = {}
        for pair in self._model.all_tied_weights_keys.items():
            for name, first in (pair, pair[::-1]):
                if (
                    _owner(first) in layers
                    and _owner(name) not in layers
                    and name not in self._dense
                ):
                    found[_owner(name)] = _owner(first)
        return found

    def _put(self, name: str, format: Format | None, shape: tuple[int, int], stored: str) -> None:
        dense = self._modules.get(name)
        if dense is None:
            return
        if not isinstance(dense, DENSE_KINDS):
            what = f"a {type(dense).__name__}, not an nn.Linear, nn.Embedding or convolution"
            raise ValueError(f"{self._path}: layer {shown(name)} is {what}")
        if (own := tuple(matrix_of(dense).shape)) != shape:
            raise ValueError(
                f"{self._path}: layer {shown(name)} has shape {own} in the model, {shape} in the file"
            )
        slot = _Slot(dense, format, {} if format is None else self._reader.specs(stored))
        for key in ("input_scale", "input_order"):
            if (spec := self._dense.get(f"{prefix_of(stored)}{key}")) is not None:
                empty = torch.empty(spec[0], dtype=spec[1], device="meta")
                slot.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        names = [n for n, module in self._modules.items() if module is dense]
        replace(self._model, names, slot)
        for pattern, dtype in self._dtypes.items():
            if re.search(rf"(^|\.){pattern}($|\.)", name):
                slot.set_weight_dtype(dtype)
        self._slots.update(dict.fromkeys(names, slot))

    def _check_dense(self) -> None:
        """Transformers makes up what a checkpoint lacks: here it is damaged."""
        model = self._model
        names = {*model.state_dict(keep_vars=True)}
        has = {self._tensor(n) for n in (*self._dense, *self._reader.header.extra)}
        has |= {f"{n}.{key}" for n, slot in self._slots.items() for key in slot._buffers}
        pairs = [*model.all_tied_weights_keys.items()]
        for _ in range(2):  # a tie may go through another one
            has |= {n for a, b in pairs for n in (a, b) if a in has or b in has}
        may = model._keys_to_ignore_on_load_missing or ()
        lost = [n for n in names - has if not any(re.search(p, n) for p in may)]
        if lost:
            raise ValueError(f"{self._path} does not fit the model: it lacks {_list(sorted(lost))}")

    def _tensor(self, name: str) -> str:
        module, _, key = name.rpartition(".")
        return prefix_of(self._name(module)) + key

    def layers(self) -> set[str]:
        """Those of the checkpoint."""
        return {*self._slots} | {
            name for name, module in self._modules.items() if isinstance(module, QuantExperts)
        }

    def finish(self) -> None:
        """Checks the values that were read."""
        model = self._model
        done: dict[str, PackedModule] = {}
        for slot in dict.fromkeys(self._slots.values()):
            names = [name for name, other in self._slots.items() if other is slot]
            unhooked(slot)
            first = self._tied.get(names[0])
            try:
                made = slot.packed(None if first is None else done[first])
            except (TypeError, ValueError) as e:
                raise type(e)(f"{self._path}: layer {shown(names[0])}: {e}") from e
            replace(model, names, made, own=slot.own)
            made.set_weight_dtype(slot.dtype)
            done.update(dict.fromkeys(names, made))
        for name in self._reader.header.extra:
            module = self._modules.get(self._name(_owner(name)))
            if module is not None:
                module.set_extra_state(self._reader.extra(name))
        model.all_tied_weights_keys = self._all_ties
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        self._modules.clear()


def _packed(
    dense: nn.Module,
    weight: QuantTensor | None,
    first: PackedModule | None,
    bias: Tensor | None,
    order: Tensor | None = None,
) -> PackedModule:
    """What takes the place of a dense module: of a weight, or sharing that of `first`."""
    made: PackedModule
    if isinstance(dense, nn.Embedding):
        weight = first.quant_tensor() if weight is None else weight  # type: ignore[union-attr]
        made = packed_embedding(dense, weight, dense.weight.dtype)
        if first is not None:
            made.share_weight(first)
    elif isinstance(dense, CONVOLUTIONS):
        made = packed_conv(dense, first.quant_tensor() if weight is None else weight, bias)  # type: ignore[union-attr]
        if first is not None:
            made.share_weight(first)
    elif first is not None:
        made = QuantLinear.tied_to(first, bias)
    elif order is not None:
        made = ReorderedLinear.from_ordered(weight, order, bias)  # type: ignore[arg-type]
    else:
        made = QuantLinear.from_quant_tensor(weight, bias)  # type: ignore[arg-type]
    return made.train(dense.training)


def state_to_save(
    model: PreTrainedModel, config: object
) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """The tensors and the metadata of a checkpoint of lowbit; names are those of the model, whatever
    transformers calls them in dense checkpoints. Nothing if adapters alone are saved, or no
    module is packed any more, and then config.json does not say so either.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None, {}
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return None, {}
    model.config.quantization_config = config
    model._weight_conversions = []  # type: ignore[assignment]
    return checkpoint_state(model)


def dequantize_modules(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Puts dense modules of the same values in the place of packed ones, in `dtype`; what shares a weight
    still does.

    Raises:
        NotImplementedError: a packed module has another dense form. Nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = {name: m for name, m in modules.items() if isinstance(m, PackedModule)}
    for name, module in packed.items():
        if not isinstance(module, QuantLinear | QuantEmbedding | QuantConv):
            raise NotImplementedError(
                f"{name} is a {type(module).__name__}; expected a linear, an embedding or a convolution"
            )
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    kinds = dict(empty.named_modules())
    weights: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    for name, module in packed.items():
        if id(module) not in made:
            dense: Any = dense_of(module, dtype)  # type: ignore[arg-type]
            dense.weight = weights.setdefault(id(module._buffers), dense.weight)
            made[id(module)] = dense.train(module.training)
        put(model, name, made[id(module)])
    dense_forms(model, packed, kinds)
    if "_weight_conversions" in vars(model):
        del model._weight_conversions


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(cut(name) for name in names[:_SHOWN]) + more
