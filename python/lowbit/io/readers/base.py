"""What a reader of checkpoints is: it knows its format, opens it, and gives its tensors by name."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.weights.quantized import QuantTensor


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor or layer: `format` is that of a packed one, else its dtype."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool


def dense_info(name: str, spec: tuple[tuple[int, ...], torch.dtype]) -> TensorInfo:
    """Of a dense tensor, by its shape and dtype."""
    shape, dtype = spec
    nbytes = math.prod(shape) * dtype.itemsize
    return TensorInfo(name, str(dtype).removeprefix("torch."), shape, nbytes, False)


class Reader(ABC):
    """An open checkpoint of one format. Errors are ValueErrors that name file, tensor and value.

    Attributes:
        name: of the format.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Whether the file or folder is of this format, judged by its first bytes, its name, its
        header or its configuration; no tensor is read.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: its header is damaged.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool = True) -> Reader:
        """Opens a checkpoint and reads its header; with `mmap` tensors may stay in the mapped file."""

    @abstractmethod
    def names(self) -> list[str]:
        """What `layer` takes: a name for every weight, those that share another's among them."""

    @abstractmethod
    def describe(self) -> list[TensorInfo]:
        """What is stored, without reading it."""

    @abstractmethod
    def layer(self, name: str) -> QuantTensor | Tensor:
        """A weight packed as stored, or a dense tensor, on the CPU; its values are checked."""

    def loss(self, name: str) -> str:
        """Why no format holds the values of a layer, which `layer` then gives dense; "" if one does."""
        return ""

    def order(self, name: str) -> Tensor | None:
        """(K,) int64, the columns of x that the columns of a layer stand for; None if they are x's own."""
        return None
