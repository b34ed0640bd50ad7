"""Folders of transformers that another program quantized: what their readers share.

A layer is several tensors under one name ("a.qweight", "a.scales"); a reader says which, what they must look like,
and what they mean. Everything is compared with the configuration when the folder is opened, before a weight is read.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.files import cut, shown
from lowbit.formats import Format
from lowbit.io.foreign import quantization_config
from lowbit.io.readers.base import Reader, TensorInfo, dense_info
from lowbit.io.readers.dense import WEIGHT_DTYPES
from lowbit.io.safetensors_file import SafetensorsFile, Specs, indexed_names, tensor_files
from lowbit.weights.quantized import QuantTensor

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Plan:
    """What a layer will be: a weight of `shape` in `format`; or, where none holds its values, their dense form, and
    why. `order`: its columns are those of x in another order. `bits` of the stored codes, and
    `rows` that share a scale (0: all), where the format does not say.
    `nearest`: what a loader quantizes it anew to, unless it is told otherwise: a dense form of every layer of a
    checkpoint would take several times its memory.
    """

    shape: tuple[int, int]
    format: Format | None
    loss: str = ""
    order: Tensor | None = None
    bits: int = 0
    rows: int = 1
    nearest: str = ""


def ordered(plan: Plan, index: Tensor, group: int, groups: int) -> Plan:
    """The plan of a layer whose column k is of group index[k]: sorted by group, if every group is whole."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx must be in [0, {groups}), got {low if low < 0 else high}")
    straight = torch.arange(len(index), dtype=torch.int64, device="cpu") // group
    if torch.equal(index, straight):
        return plan
    order = torch.argsort(index, stable=True)
    if torch.equal(index[order], straight):
        return replace(plan, order=order)
    return replace(plan, format=None, loss=f"its groups are not all of {group} columns")


def _check_nan(weight: QuantTensor) -> None:
    """Two codes of E4M3 are NaN, and eight of E5M2 NaN or inf."""
    codec = weight.format.codec
    bits = {"e4m3": 0x7F, "e5m2": 0x7C}.get(codec)
    if bits is not None and bool((weight.tensors["codes"] & bits == bits).any()):
        raise ValueError(f"the weight holds NaN or inf in {codec}")


class FolderReader(Reader):
    """An open folder.

    Attributes:
        path: of the folder.
        config: its quantization_config.
        plans: what every layer will be. Of experts whose tensors are stacked each is a layer, "a.down_proj.0".
        stacks: of each layer of such, the name of the stack and its index there.
        dense: shape and dtype of every tensor that belongs to no layer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration is not understood, or tensors do not agree with it.
    """

    methods: ClassVar[frozenset[str]]
    # Every part that a layer may have, and those of which one makes a layer.
    parts: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]
    separator: ClassVar[str] = "."  # between the name of a layer and a part

    def __init__(self, path: str | os.PathLike[str], mmap: bool = True) -> None:
        self.path = Path(path)
        found = quantization_config(self.path)
        assert found is not None
        self.config: dict[str, Any] = found
        self._files: dict[str, SafetensorsFile] = {}
        self.dense: Specs = {}
        for file in tensor_files(self.path):
            opened = SafetensorsFile(file, mmap)
            for name in opened.specs.keys() & self.dense.keys():
                raise ValueError(f"{file}: {shown(name)} is in another file of the checkpoint too")
            self._files.update(dict.fromkeys(opened.specs, opened))
            self.dense.update(opened.specs)
        self._check_index()
        self._check_config()
        self._names = self._find_layers()
        self.plans: dict[str, Plan] = {}
        self.stacks: dict[str, tuple[str, int]] = {}
        self._stack()
        own = {name for names in self._names.values() for name in names.values()}
        stored = {name: self.dense.pop(name) for name in own}
        for layer, names in self._names.items():
            specs = {part: stored[name] for part, name in names.items()}
            if layer in self.stacks:
                specs = {part: (shape[1:], dtype) for part, (shape, dtype) in specs.items()}
            try:
                self.plans[layer] = self._plan(layer, specs)
            except ValueError as e:
                raise ValueError(f"{self._file_of(layer)}: layer {shown(layer)}: {e}") from e
        self._check_dense()

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By the quant_method that its configuration names."""
        config = quantization_config(path)
        return config is not None and config.get("quant_method") in cls.methods

    @classmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool = True) -> FolderReader:
        """Opens a folder."""
        return cls(path, mmap)

    @abstractmethod
    def _plan(self, layer: str, specs: Mapping[str, Spec]) -> Plan:
        """What a layer of these parts will be.

        Raises:
            ValueError: naming the part, what it is and what was expected.
        """

    @abstractmethod
    def _decode(self, plan: Plan, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        """The layer of these tensors: in the plan's format, or without one its values."""

    def _check_config(self) -> None:
        """Raises ValueError if the configuration cannot be used at all."""

    def names(self) -> list[str]:
        """Layers, by the name of their module, then dense tensors."""
        return [*self.plans, *self.dense]

    def describe(self) -> list[TensorInfo]:
        """Layers with the formats that they get, as far as the configuration tells, stacks as one; then dense ones."""
        return [
            *(
                self._layer_info(layer, plan)
                for layer, plan in self.plans.items()
                if layer not in self.stacks or self.stacks[layer][1] == 0
            ),
            *(dense_info(name, spec) for name, spec in self.dense.items()),
        ]

    def _layer_info(self, layer: str, plan: Plan) -> TensorInfo:
        names = self._names[layer].values()
        specs = [self._files[name].specs[name] for name in names]
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
        label = plan.format.name if plan.format else f"{self.name}, in no format of lowbit"
        if layer not in self.stacks:
            return TensorInfo(layer, label, plan.shape, size, True)
        return TensorInfo(self.stacks[layer][0], label, (specs[0][0][0], *plan.shape), size, True)

    def layer(self, name: str) -> QuantTensor | Tensor:
        """A layer packed as stored, or a dense tensor; a layer that no format holds is dense, in fp32."""
        if name not in self.plans:
            return self._files[name].tensor(name)
        plan = self.plans[name]
        index = self.stacks[name][1] if name in self.stacks else None
        tensors = {
            part: self._files[full].tensor(full, index) for part, full in self._names[name].items()
        }
        try:
            made = self._decode(plan, tensors)
            if isinstance(made, QuantTensor):
                _check_nan(made.validate())
            elif not bool(made.isfinite().all()):
                raise ValueError("the values hold NaN or inf")
        except ValueError as e:
            raise ValueError(f"{self._file_of(name)}: layer {shown(name)}: {e}") from e
        return made

    def loss(self, name: str) -> str:
        """Why no format holds a layer."""
        return self.plans[name].loss if name in self.plans else ""

    def order(self, name: str) -> Tensor | None:
        """The columns of x that the columns of a layer stand for."""
        return self.plans[name].order if name in self.plans else None

    def fit(self, layer: str, shape: tuple[int, ...]) -> None:
        """Tells what shape a layer has in the model, which some files leave open.

        Raises:
            ValueError: it cannot have it.
        """
        if self.plans[layer].shape != shape:
            raise ValueError(
                f"{self._file_of(layer)}: layer {shown(layer)} has shape {self.plans[layer].shape}, the "
                f"model's has {shape}"
            )

    def _tensor(self, name: str) -> Tensor:
        return self._files[name].tensor(name)

    def _part(self, layer: str, part: str) -> Tensor | None:
        """A part that is small and says what the layer is."""
        name = f"{layer}{self.separator}{part}"
        return self._tensor(name) if name in self._files else None

    def _file_of(self, layer: str) -> Path:
        return self._files[next(iter(self._names[layer].values()))].path

    def _find_layers(self) -> dict[str, dict[str, str]]:
        """The tensors of every layer by their parts."""
        found: dict[str, dict[str, str]] = {
            name[: -len(marker) - 1]: {}
            for name in self.dense
            for marker in self.markers
            if name.endswith(f"{self.separator}{marker}")
        }
        for layer, names in found.items():
            for part in self.parts:
                if (full := f"{layer}{self.separator}{part}") in self.dense:
                    names[part] = full
        return found

    def _stacked(self, layer: str, names: Mapping[str, str]) -> bool:
        """Whether the first dimension of a layer's tensors counts experts."""
        return False

    def _stack(self) -> None:
        """Makes a layer for every expert of those whose tensors are stacked."""
        for stack, names in list(self._names.items()):
            if not self._stacked(stack, names):
                continue
            del self._names[stack]
            shapes = {part: self.dense[name][0] for part, name in names.items()}
            counts = {0 if 0 in shape else shape[0] for shape in shapes.values() if shape}
            if len(counts) > 1 or not all(shapes.values()) or not all(counts):
                file = self._files[next(iter(names.values()))].path
                raise ValueError(
                    f"{file}: the tensors of {shown(stack)} must be of as many experts, got {shapes}"
                )
            for e in range(counts.pop()):
                self._names[f"{stack}.{e}"] = names
                self.stacks[f"{stack}.{e}"] = stack, e

    def _check_index(self) -> None:
        # A shard that lacks tensors of the index is another checkpoint's, or old.
        for name, file in indexed_names(self.path).items():
            if name not in self._files:
                raise ValueError(
                    f"{self.path / file}: lacks tensor {shown(name)} that the index names"
                )

    def _check_dense(self) -> None:
        for name, (_, dtype) in self.dense.items():
            if name.endswith(".weight") and dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{self._files[name].path}: {cut(name)} is {dtype}, and the tensors that say "
                    f"what its values are ({', '.join(self.markers)}) are missing"
                )
