"""Fills an empty transformers model from an open folder that another program quantized, a layer at a time."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.files import shown
from lowbit.formats import Format, as_format
from lowbit.integrations.configuration import empty_model
from lowbit.integrations.folder_names import Names
from lowbit.integrations.inexact import Inexact, quantize_anew
from lowbit.integrations.memory import return_freed_memory
from lowbit.io.readers.folder import FolderReader
from lowbit.nn import PackedModule, QuantExperts, QuantLinear, ReorderedLinear
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.stand_ins import is_linear, put_stand_ins, take_away
from lowbit.nn.surgery import replace
from lowbit.weights.quantized import QuantTensor

_SHOWN = 8
_LARGE = 1 << 20  # weights whose temporaries are worth giving back
_WEIGHT = ".weight"


@dataclass
class Found:
    """What a checkpoint held and what became of it, by layers: `packed` and `requantized` with their formats.

    Attributes:
        share: of the model's weights that are packed.
    """

    kind: str
    share: float = 0.0
    packed: dict[str, str] = field(default_factory=dict)
    requantized: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [self.kind]
        for what, layers in (
            ("packed as stored", self.packed),
            ("requantized", self.requantized),
        ):
            counts = Counter(layers.values()).most_common()
            formats = ", ".join(f"{count} {name}" for name, count in counts)
            parts.append(f"{len(layers)} layers {what}" + (f" ({formats})" if layers else ""))
        parts.append(f"{len(self.dense)} dense" + (f" ({_list(self.dense)})" if self.dense else ""))
        parts.append(f"{100 * self.share:.1f} % of the weights are packed")
        if self.unused:
            parts.append(f"{len(self.unused)} tensors not used ({_list(self.unused)})")
        return "; ".join(parts)


def packed_share(model: nn.Module) -> float:
    """The share of a model's weights that are packed, those that modules share once."""
    packed = {
        id(module._buffers): math.prod(module.shape)
        for module in model.modules()
        if isinstance(module, PackedModule)
    }
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return sum(packed.values()) / max(1, dense + sum(packed.values()))


def fill(
    reader: FolderReader,
    dtype: torch.dtype | None,
    device: torch.device | str,
    format: Format | None,
    inexact: Inexact,
    decoded: bool = False,
) -> tuple[PreTrainedModel, Found]:
    """Makes the model of a folder.

    Args:
        reader: of the folder.
        dtype, device, format, inexact: as in `load_model`.
        decoded: make every layer dense.

    Raises:
        ImportError, NotImplementedError, ValueError: as `load_model`.
    """
    model = empty_model(reader.path, dtype)
    for config in (
        model.config,
        *(v for v in vars(model.config).values() if hasattr(v, "to_dict")),
    ):
        vars(config).pop("quantization_config", None)
    job = _Filling(reader, model, device, format, inexact, decoded)
    job.run()
    return model, job.found


class _Filling:
    def __init__(
        self,
        reader: FolderReader,
        model: PreTrainedModel,
        device: torch.device | str,
        format: Format | None,
        inexact: Inexact,
        decoded: bool,
    ) -> None:
        self.reader, self.model, self.device, self.format = reader, model, device, format
        self.inexact, self.decoded = inexact, decoded
        self._errors: dict[str, float] = {}
        self.found = Found(str(reader.config.get("quant_method", reader.name)))
        self._dtype: torch.dtype = model.dtype
        self._plan = model._get_dtype_plan(self._dtype)
        names = Names(model, reader.path)
        self._stored = {names.tensor(name): name for name in reader.dense}
        ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        self._ignored = lambda name: any(p.search(name) for p in ignored)
        self._layers = {}
        for layer in reader.plans:
            stack, e = reader.stacks.get(layer, ("", 0))
            name = f"{names.tensor(stack)}.{e}" if stack else names.layer(layer)
            if names.has(name) or not self._ignored(name):
                self._layers[name] = layer
        put_stand_ins(model, (*self._layers, *names.experts))
        self._wanted: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        self._stacks = {name for name, m in model.named_modules() if isinstance(m, QuantExperts)}
        self._shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._shared.setdefault(id(parameter), []).append(name)
        self._filled: set[str] = set()
        self._last_bias: tuple[str, Tensor] = (
            "",
            torch.empty(0, dtype=torch.float32, device="cpu"),
        )

    def run(self) -> None:
        self._check()
        for name, layer in self._layers.items():
            self._fill_layer(name, layer)
            if math.prod(self.reader.plans[layer].shape) >= _LARGE:
                return_freed_memory()
        for name, stored in self._stored.items():
            if name in self._wanted and name not in self._filled:
                self._set(name, self.reader.layer(stored))
        self._fill_stacks()
        self._share()
        # Not the state dict, which makes the canonical form of every packed weight.
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        if missing := sorted(name for name, t in tensors if t.is_meta):
            raise ValueError(f"{self.reader.path}: lacks {len(missing)} tensors: {_list(missing)}")
        take_away(self.model)
        self.found.share = packed_share(self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) or is_linear(module):
                self.found.dense.append(name)
        if self.found.unused:
            warnings.warn(
                f"{self.reader.path}: {len(self.found.unused)} tensors are no part of a "
                f"{type(self.model).__name__} and are not used: {_list(self.found.unused)}",
                stacklevel=4,
            )
        if not self.decoded:
            self._warn_of_loss()

    def _warn_of_loss(self) -> None:
        losses = {n: self.reader.loss(layer) for n, layer in self._layers.items()}
        anew = self._errors
        dense = [n for n in losses if losses[n] and n not in self.found.requantized]
        for names, what in (
            (dense, "they are dense: {}; quantize them anew with inexact= or format="),
            (
                list(anew),
                f"they are quantized anew to {', '.join({self.found.requantized[n] for n in anew})}, with a relative "
                f"error of up to {max(anew.values(), default=0):.2g}: {{}}; inexact='dense' keeps their values",
            ),
        ):
            if names:
                warnings.warn(
                    f"{self.reader.path}: no format holds {len(names)} layers exactly ({losses[names[0]]}), "
                    + what.format(_list(names)),
                    stacklevel=5,
                )

    def _check(self) -> None:
        """Raises unless every layer has its linear; notes what has no place in the model."""
        modules = dict(self.model.named_modules())
        for name, layer in self._layers.items():
            module = modules.get(name)
            own: Any = self._wanted.get(name + _WEIGHT)
            if not isinstance(module, nn.Linear | nn.Embedding) and (own is None or own.dim() != 2):
                kind = "no module" if module is None else f"a {type(module).__name__}"
                raise NotImplementedError(
                    f"{self.reader.path}: layer {shown(layer)} must be an nn.Linear or nn.Embedding of "
                    f"the {type(self.model).__name__}, it is {kind}"
                )
            self.reader.fit(layer, tuple(own.shape))
        biases = {f"{name}.bias" for name in self._layers}
        for name, stored in self._stored.items():
            known = name in self._wanted or name in biases
            if known or name.removesuffix("_bias") in self._stacks or self._ignored(name):
                continue
            self.found.unused.append(stored)

    def _fill_layer(self, name: str, layer: str) -> None:
        module, weight = self.model.get_submodule(name), self.reader.layer(layer)
        order, bias = self.reader.order(layer), self._bias(name, module)
        decoded = self.decoded
        if not isinstance(module, nn.Linear | nn.Embedding):
            # What scores experts: a parameter of a module of its own.
            decoded = True
            self.found.dense.append(name)
        elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            decoded = True  # DeepSeek-V4's products of groups
        target = None if self._is_head(module) else self.format
        nearest = self._nearest(layer) if target is None else None
        if decoded or target is not None:
            weight = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            if order is not None:
                weight, order = weight[:, torch.argsort(order)], None
        chosen = target or nearest
        if not decoded and chosen is not None:
            assert isinstance(weight, Tensor)
            weight, error = quantize_anew(weight, chosen)
            self.found.requantized[name] = weight.format.name
            if nearest is not None:
                self._errors[name] = error
        elif not decoded and isinstance(weight, QuantTensor):
            self.found.packed[name] = weight.format.name
        if not isinstance(weight, QuantTensor):
            # In the shape of the module, which may stand for a transposed one.
            dense = weight.to(self.device, self._own_dtype(name + _WEIGHT))
            self._put(name + _WEIGHT, dense)
            if bias is not None:
                self._put(f"{name}.bias", bias)
            return
        weight = weight.to(self.device)
        made: PackedModule
        if isinstance(module, nn.Embedding):
            made = packed_embedding(module, weight, self._dtype)
        elif order is not None:
            made = ReorderedLinear.from_ordered(weight, order, bias, self._dtype)
        else:
            made = QuantLinear.from_quant_tensor(weight, bias, self._dtype)
        replace(self.model, name, made)
        made.set_weight_dtype(self._dtype)  # not that of the empty model
        self._filled.update((name + _WEIGHT, f"{name}.bias"))

    def _nearest(self, layer: str) -> Format | None:
        """What a layer is quantized to because no format holds it."""
        plan = self.reader.plans[layer]
        if not plan.loss or self.inexact == "dense":
            return None
        if self.inexact is None:
            return as_format(plan.nearest) if plan.nearest else None
        return self.inexact

    def _is_head(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) or module is self.model.get_output_embeddings()

    def _bias(self, name: str, module: nn.Module) -> Tensor | None:
        """The bias of a layer; of one that has none in the model, a stored one that is not all zero."""
        full = f"{name}.bias"
        stack, _, expert = name.rpartition(".")
        if full not in self._stored and stack in self._stacks and f"{stack}_bias" in self._stored:
            return self._stacked_bias(stack)[int(expert)]
        if full not in self._stored:
            if getattr(module, "bias", None) is not None:
                raise ValueError(f"{self.reader.path}: lacks tensor {shown(full)}")
            return None
        bias = self.reader.layer(self._stored[full])
        assert isinstance(bias, Tensor)
        if getattr(module, "bias", None) is None and not bool(bias.any()):
            return None
        return bias.to(self.device, self._dtype)

    def _stacked_bias(self, stack: str) -> Tensor:
        """(experts, N), of the linears of a `QuantExperts`."""
        name = f"{stack}_bias"
        if self._last_bias[0] != name:
            bias, experts = self.reader.layer(self._stored[name]), self.model.get_submodule(stack)
            assert isinstance(bias, Tensor)
            assert isinstance(experts, QuantExperts)
            self._check_shape(name, bias, experts.shape[:2])
            self._last_bias = name, bias.to(self.device, self._own_dtype(name))
        return self._last_bias[1]

    def _fill_stacks(self) -> None:
        """Gives experts what the folder holds dense of all of a layer."""
        for stack in self._stacks:
            experts: Any = self.model.get_submodule(stack)
            stored = self._stored.get(stack)
            weight: Any = None if stored is None else self.reader.layer(stored)
            if weight is not None:
                module: Any = self.model.get_submodule(stack.rpartition(".")[0])
                weight = weight.transpose(1, 2) if module.is_transposed else weight
                self._check_shape(stack, weight, experts.shape)
            for e, layer in enumerate(experts):
                if not isinstance(layer, nn.Linear):
                    continue
                if weight is not None:
                    self._set(f"{stack}.{e}.weight", weight[e].contiguous())
                if f"{stack}.{e}.bias" not in self._filled and layer.bias is not None:
                    bias = self._bias(f"{stack}.{e}", layer)
                    assert bias is not None
                    self._put(f"{stack}.{e}.bias", bias)

    def _check_shape(self, name: str, value: Tensor, shape: Sequence[int]) -> None:
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"{self.reader.path}: tensor {shown(name)} must have shape {tuple(shape)}, got {tuple(value.shape)}"
            )

    def _set(self, name: str, value: QuantTensor | Tensor) -> None:
        old = self._wanted[name]
        assert isinstance(value, Tensor)
        self._check_shape(name, value, old.shape)
        if old.is_floating_point():
            value = value.to(self._own_dtype(name))
        self._put(name, value.to(self.device))

    def _put(self, name: str, value: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module.register_parameter(leaf, nn.Parameter(value, value.is_floating_point()))
        self._filled.add(name)

    def _own_dtype(self, name: str) -> torch.dtype:
        """That of the model, but of what transformers keeps in fp32."""
        for pattern, dtype in self._plan.items():
            if re.search(rf"(^|\.){pattern}($|\.)", name):
                return dtype
        return self._dtype

    def _share(self) -> None:
        """What the model shares and the folder holds once, it still shares."""
        for names in self._shared.values():
            first = next((n for n in names if n in self._filled), None)
            for name in names:
                if first is None or name in self._filled:
                    continue
                source = self.model.get_submodule(first.removesuffix(_WEIGHT))
                target = name.removesuffix(_WEIGHT)
                if isinstance(source, PackedModule):
                    replace(self.model, target, QuantLinear.tied_to(source))
                else:
                    parent, _, leaf = name.rpartition(".")
                    shared = self.model.get_parameter(first)
                    self.model.get_submodule(parent).register_parameter(leaf, shared)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"{name:.200}" for name in names[:_SHOWN]) + more
