"""GGUF files among the checkpoints that lowbit reads; needs package `gguf` to open one alone."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from lowbit.io.readers.base import Reader, TensorInfo
from lowbit.weights.quantized import QuantTensor

_DENSE = ("F", "BF", "I")  # F16, F32, F64, BF16, I8 .. I64, but not IQ4_NL


class GGUFReader(Reader):
    """An open GGUF file, or one of which any part was named."""

    name = "gguf"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from lowbit.io.readers.gguf import GGUFFile

        self.file = GGUFFile(path)

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By its magic; by its suffix too, so that a damaged file is told what is wrong with it."""
        if path.suffix == ".gguf" or not os.path.isfile(path):
            return path.suffix == ".gguf"
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"

    @classmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool = True) -> GGUFReader:
        """Opens a file; its tensors are always copies."""
        return cls(path)

    def names(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self.file)

    def describe(self) -> list[TensorInfo]:
        """Types as GGUF names them, in lower case."""
        return [
            TensorInfo(
                t.name,
                t.type.name.lower(),
                t.shape,
                t.nbytes,
                t.type.name.rstrip("0123456789") not in _DENSE,
            )
            for t in self.file.tensors.values()
        ]

    def layer(self, name: str) -> QuantTensor | Tensor:
        """As a look-up in `GGUFFile`."""
        return self.file[name]
