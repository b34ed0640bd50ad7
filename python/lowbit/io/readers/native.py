"""Reads lowbit's own checkpoints, whose files `lowbit.io.native` describes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.files import cut, shown
from lowbit.formats import Format
from lowbit.io import extra_state
from lowbit.io.native import Header, parse_header, prefix_of
from lowbit.io.readers.base import Reader, TensorInfo, dense_info
from lowbit.io.safetensors_file import SafetensorsFile, Specs, tensor_files
from lowbit.nn import states
from lowbit.weights.quantized import TENSOR_NAMES, QuantTensor, file_specs, tensor_specs


class NativeReader(Reader):
    """An open checkpoint of one or more files whose header agrees with its tensors.

    Args:
        path: a file, or a folder with one or with an index.
        mmap: map the files into memory; else every tensor is a copy.

    Attributes:
        path: as given.
        header: the headers of all files together.
        dense: shape and dtype of every stored tensor that belongs to no layer.
        beside: the names of tensors of layers that are for others: `states.MARKER`, and the extra states that
            `load_state_dict` wants of a file that `save_pretrained` wrote.
        inner: the names of the tensors, stored or tied, that belong to an extra state in the header.
    """

    name = "lowbit"

    def __init__(self, path: str | os.PathLike[str], mmap: bool = True) -> None:
        self.path = Path(path)
        self.header = Header({}, {})
        self.beside: set[str] = set()
        self._files: dict[str, SafetensorsFile] = {}
        self._packs_scales: dict[str, bool] = {}
        specs: Specs = {}
        for file in tensor_files(self.path):
            opened = SafetensorsFile(file, mmap)
            header = parse_header(file, opened.metadata)
            for name in set(opened.specs) & set(specs):
                raise ValueError(f"{file}: {shown(name)} is in another file of the checkpoint too")
            # Each file of transformers has the whole header.
            own: tuple[tuple[Mapping[str, object], Mapping[str, object]], ...] = (
                (header.layers, self.header.layers),
                (header.extra, self.header.extra),
            )
            for new, old in own:
                for name in new.keys() & old.keys():
                    if new[name] != old[name]:
                        raise ValueError(
                            f"{file}: {shown(name)} is in another file of the checkpoint too"
                        )
            self.header.layers.update(header.layers)
            self._packs_scales.update(dict.fromkeys(header.layers, header.packs_scales))
            self.header.tied.update(header.tied)
            self.header.extra.update(header.extra)
            self._files.update(dict.fromkeys(opened.specs, opened))
            specs.update(opened.specs)
        for name, (format, shape) in self.header.layers.items():
            self._check_layer(name, format, shape, specs)
        self.dense = specs
        self._check_ties()
        self.inner = {t for name in self.header.extra for t in self._check_extra(name)}

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By the entry in the metadata of any of its files; errors as those of the constructor."""
        return any("lowbit" in SafetensorsFile(file).metadata for file in tensor_files(path))

    @classmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool = True) -> NativeReader:
        """Opens a checkpoint."""
        return cls(path, mmap)

    def names(self) -> list[str]:
        """Layers, dense tensors, and the names that share one of them."""
        return [*self.header.layers, *self.dense, *self.header.tied]

    def describe(self) -> list[TensorInfo]:
        """Layers with their formats, then dense tensors; names that share another's are left out."""
        return [
            *(
                TensorInfo(name, format.name, shape, self._bytes(name), True)
                for name, (format, shape) in self.header.layers.items()
            ),
            *(dense_info(name, spec) for name, spec in self.dense.items()),
        ]

    def _bytes(self, name: str) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs(name).values())

    def layer(self, name: str) -> QuantTensor | Tensor:
        """A layer or a dense tensor, of its own or shared."""
        stored = self.header.tied.get(name, name)
        return self.weight(stored) if stored in self.header.layers else self.tensor(stored)

    def specs(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a stored layer, as the files hold it."""
        format, shape = self.header.layers[name]
        specs = file_specs if self._packs_scales[name] else tensor_specs
        return specs(format, *shape)

    def _check_layer(
        self,
        name: str,
        format: Format,
        shape: tuple[int, int],
        specs: Specs,
    ) -> None:
        """Compares the tensors of a layer with its format and takes them out of `specs`."""
        prefix = prefix_of(name)
        expected = self.specs(name)
        if specs.get(f"{prefix}weight") == states.MARKER:
            del specs[f"{prefix}weight"]
            self.beside.add(f"{prefix}weight")
        if (state := f"{prefix}_extra_state") in specs:
            try:
                states.check(self.tensor(state), format, shape)
            except (TypeError, ValueError) as e:
                raise ValueError(f"{self.path}: layer {shown(name)}: {e}") from e
            del specs[state]
            self.beside.add(state)
        for key in TENSOR_NAMES:
            full = prefix + key
            found = specs.pop(full, None)
            if key not in expected:
                if found:
                    raise ValueError(
                        f"{self.path}: {cut(full)} is not part of format {shown(format.name)}"
                    )
            elif not found:
                raise ValueError(
                    f"{self.path}: {cut(full)} is missing, layer {shown(name)} is {shown(format.name)}"
                )
            elif found != expected[key]:
                raise ValueError(
                    f"{self.path}: {cut(full)} of a {shape} weight in format {shown(format.name)} must be "
                    f"{expected[key][1]} of shape {expected[key][0]}, "
                    f"got {found[1]} of shape {found[0]}"
                )

    def _check_ties(self) -> None:
        for name, first in self.header.tied.items():
            stored = first in self.header.layers or first in self.dense
            if not stored or name in self.header.layers or name in self.dense:
                raise ValueError(
                    f"{self.path}: the header ties {shown(name)} to {shown(first)}, which cannot be"
                )

    def _check_extra(self, name: str) -> list[str]:
        """The tensors of an extra state."""
        own: dict[str, Mapping[str, object]] = {
            "layers": self.header.layers,
            "tensors": self.dense,
            "ties": self.header.tied,
        }
        for kind, names in own.items():
            if name in names:
                raise ValueError(
                    f"{self.path}: {shown(name)} is an extra state and one of the {kind} too"
                )
        inner: list[str] = []
        try:
            extra_state.decode(self.header.extra[name], lambda i: inner.append(f"{name}.{i}"))
        except ValueError as e:
            raise ValueError(f"{self.path}: {shown(name)}: {e}") from e
        for tensor in inner:
            if self.header.tied.get(tensor, tensor) not in self.dense:
                raise ValueError(f"{self.path}: {cut(tensor)} is missing")
        return inner

    def extra(self, name: str, device: torch.device | str = "cpu") -> Any:
        """An extra state, in the header or a tensor; its tensors are copies."""

        def tensor(name: str) -> Tensor:
            return self.tensor(self.header.tied.get(name, name)).to(device, copy=True)

        if name in self.header.extra:
            return extra_state.decode(self.header.extra[name], lambda i: tensor(f"{name}.{i}"))
        return tensor(name)

    def weight(self, name: str, device: torch.device | str = "cpu") -> QuantTensor:
        """The weight of a stored layer, its values checked."""
        format, shape = self.header.layers[name]
        prefix = prefix_of(name)
        tensors = {
            key: self._files[prefix + key].tensor(prefix + key).to(device)
            for key in self.specs(name)
        }
        try:
            return QuantTensor.from_file(format, shape, tensors).validate()
        except ValueError as e:
            raise ValueError(f"{self.path}: layer {shown(name)}: {e}") from e

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A stored dense tensor."""
        return self._files[name].tensor(name).to(device)
