"""The safetensors container: a reader with clear errors, and a writer that streams and is atomic.

The writer lays a file out before it has the tensors and then asks for one group of them at a time,
so that a model larger than memory can be converted.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.files import InputFile, cut, kind_of, shown, write_atomically
from lowbit.strides import bytes_of

FILE_NAME = "model.safetensors"
INDEX_NAME = f"{FILE_NAME}.index.json"
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # of the safetensors library
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Of newer versions of torch.
for _attribute, _name in (
    ("uint16", "U16"),
    ("uint32", "U32"),
    ("uint64", "U64"),
    ("complex64", "C64"),
    ("float8_e8m0fnu", "F8_E8M0"),
):
    if hasattr(torch, _attribute):
        _DTYPES[getattr(torch, _attribute)] = _name
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """Tensors that are made together: their names, shapes and dtypes now, the tensors when they
    are written.
    """

    specs: Specs
    make: Callable[[], Mapping[str, Tensor]]


def write(path: Path, sources: list[Source], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        TypeError: safetensors has no name for a dtype, or a name is no string.
        ValueError: a name comes twice, is reserved or cannot be encoded, the header is larger than
            the safetensors library reads, or a source makes something else than it announced.
    """
    header, offsets = _header(sources, metadata)

    def write_all(f: BinaryIO) -> None:
        f.write(header)
        for source in sources:
            tensors = source.make()
            if set(tensors) != set(source.specs):
                raise ValueError(f"{path}: {sorted(tensors)} were made, not {sorted(source.specs)}")
            for name, (shape, dtype) in source.specs.items():
                t = tensors[name]
                if tuple(t.shape) != shape or t.dtype != dtype:
                    raise ValueError(
                        f"{path}: {name} must be {dtype} of shape {shape}, "
                        f"got {t.dtype} of shape {tuple(t.shape)}"
                    )
                f.seek(len(header) + offsets[name])
                f.write(bytes_of(t).numpy().data)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write_all)


def _header(sources: list[Source], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where each tensor starts after them."""
    specs: Specs = {}
    for source in sources:
        for name, spec in source.specs.items():
            if name in specs:
                raise ValueError(f"tensor {shown(name)} comes twice")
            _check_name(name)
            if spec[1] not in _DTYPES:
                raise TypeError(f"tensor {shown(name)}: safetensors cannot hold {spec[1]}")
            specs[name] = spec
    entries: dict[str, object] = {_METADATA: dict(metadata)}
    offsets = {}
    end = 0
    # Wide dtypes first: every tensor is then aligned to its own element.
    for name, (shape, dtype) in sorted(specs.items(), key=lambda i: (-i[1][1].itemsize, i[0])):
        begin = end
        end += torch.Size(shape).numel() * dtype.itemsize
        offsets[name] = begin
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the header must take at most {_MAX_HEADER} bytes, got {len(text)}")
    return len(text).to_bytes(8, "little") + text, offsets


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"the name of a tensor must be a string, got {shown(name)}")
    if name == _METADATA:
        raise ValueError(f"no tensor can be named {name!r}, the entry of the file's metadata")
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"tensor {shown(name)}: the name cannot be written in UTF-8: {e.reason}"
        ) from e


class SafetensorsFile:
    """One open safetensors file. Every error is a ValueError that names the file.

    Args:
        path: the file.
        mmap: map the file into memory; else each tensor is a copy.

    Attributes:
        path: the file.
        metadata: the strings of the header.
        specs: shape and dtype of every tensor.
    """

    def __init__(self, path: Path, mmap: bool = True) -> None:
        self.path = path
        self._input = InputFile(path)
        self._mmap = mmap
        self._offsets: dict[str, int] | None = None
        with self._clear_errors():
            self._file = safe_open(self._input.name, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self._stored: Specs = {}
        for name, s in slices.items():
            if s.get_dtype() not in _TORCH_DTYPES:
                raise ValueError(
                    f"{path}: tensor {shown(name)} has the dtype {s.get_dtype()}, which lowbit or "
                    f"torch {torch.__version__} does not know"
                )
            self._stored[name] = (tuple(s.get_shape()), _TORCH_DTYPES[s.get_dtype()])
        self.specs = self._stored

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """The tensor `name`, on the CPU, or with an `index` what it has there, of which alone bytes are read."""
        with self._clear_errors(f", tensor {shown(name)}"):
            if not self._mmap:
                return self._read(name, index)
            t = self._file.get_tensor(name)
            t = t if index is None else t[index]
            # Not all files pad their header, so that tensors are aligned.
            return t if t.data_ptr() % t.element_size() == 0 else t.clone()

    def _read(self, name: str, index: int | None) -> Tensor:
        """A copy that no mapped page stands behind."""
        shape, dtype = self._stored[name]
        shape = shape if index is None else shape[1:]
        if self._offsets is None:
            size = int.from_bytes(self._input.read(0, 8), "little")
            entries = json.loads(self._input.read(8, size))
            entries.pop(_METADATA, None)
            self._offsets = {n: 8 + size + e["data_offsets"][0] for n, e in entries.items()}
        count = torch.Size(shape).numel() * dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = self._input.read(self._offsets[name] + (index or 0) * count, count)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)

    @contextlib.contextmanager
    def _clear_errors(self, where: str = "") -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError) as e:
            kind = "" if where else kind_of(self._input)
            raise ValueError(
                f"{self.path}{where}: not a readable safetensors file{kind}: {cut(str(e))}"
            ) from e


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or of a folder those that transformers
    loads: model.safetensors, else what its index lists; else the only one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the index is damaged or points outside the folder.
    """
    # Unlike Path's methods, these take names that no file can have.
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"no file or folder {shown(str(path))}")
        return [path]
    whole, index = path / FILE_NAME, path / INDEX_NAME
    if whole.exists():
        return [whole]
    if index.exists():
        return _indexed_files(index)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{path} must hold one .safetensors file, {FILE_NAME} or {INDEX_NAME}, "
            f"found {[f.name for f in files]}"
        )
    return files


def indexed_names(folder: Path) -> dict[str, str]:
    """The tensors that the index of a folder names, with the names of their files; none if the files were not found
    by an index.
    """
    index = folder / INDEX_NAME
    return _weight_map(index) if index.exists() and not (folder / FILE_NAME).exists() else {}


def _weight_map(index: Path) -> dict[str, str]:
    file = InputFile(index)
    try:
        weight_map = json.loads(file.read(0, file.size))["weight_map"]
        return dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not an index of safetensors files: {shown(e)}") from e


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(_weight_map(index).values())
    except TypeError as e:  # a name that is no string
        raise ValueError(f"{index}: not an index of safetensors files: {shown(e)}") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {shown(name)} is not a file name in this folder")
        if not os.path.isfile(index.parent / name):
            raise FileNotFoundError(f"{index}: the file {shown(name)} is missing")
    return sorted(index.parent / name for name in names)
