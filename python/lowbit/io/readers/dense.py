"""Checkpoints that nobody has quantized: safetensors files as PyTorch writes them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lowbit.io.foreign import refuse_quantized
from lowbit.io.readers.base import Reader, TensorInfo, dense_info
from lowbit.io.safetensors_file import SafetensorsFile, tensor_files

# fp8 is left out: such a weight has a scale of its own beside it.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class DenseFile(SafetensorsFile):
    """A file whose tensors of WEIGHT_DTYPES are all read in one dtype, if one is given."""

    def __init__(self, path: Path, mmap: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__(path, mmap)
        if dtype is not None:
            self.specs = {
                name: (shape, dtype if own in WEIGHT_DTYPES else own)
                for name, (shape, own) in self.specs.items()
            }

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """As of the other files, in the dtype of `specs`."""
        return super().tensor(name, index).to(self.specs[name][1])


class DenseReader(Reader):
    """An open dense checkpoint.

    Args:
        path: a file, or a folder with one or with an index.
        mmap: map the files into memory; else every tensor is a copy.
        dtype: what WEIGHT_DTYPES are converted to as they are read; None keeps what each has.

    Attributes:
        files: its files, open.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is damaged, or somebody has quantized the checkpoint.
    """

    name = "dense"

    def __init__(
        self, path: str | os.PathLike[str], mmap: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        refuse_quantized(Path(path))
        self.files = [DenseFile(file, mmap, dtype) for file in tensor_files(Path(path))]
        self._files = {name: file for file in self.files for name in file.specs}

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Always: whatever is no dense checkpoint is refused when it is opened, by what it is."""
        return True

    @classmethod
    def open(cls, path: str | os.PathLike[str], mmap: bool = True) -> DenseReader:
        """Opens a checkpoint whose tensors keep their dtypes."""
        return cls(path, mmap)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def describe(self) -> list[TensorInfo]:
        """Shape and dtype of every tensor."""
        return [dense_info(name, file.specs[name]) for name, file in self._files.items()]

    def layer(self, name: str) -> Tensor:
        """A tensor in the dtype of the file, or in the one that was asked for."""
        return self._files[name].tensor(name)
