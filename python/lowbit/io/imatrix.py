"""Importance matrices of llama.cpp: the squares of the inputs of every matrix, summed over tokens.

Read are its GGUF files and the binary ones (.dat) from before them; written are GGUF files.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import torch
from torch import Tensor

from lowbit.files import InputFile, kind_of, shown, staged
from lowbit.io.gguf_names import tensor_names
from lowbit.io.readers.gguf import GGUFFile
from lowbit.strides import contiguous

__all__ = ["Entry", "Imatrix", "read", "tensor_names", "write"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = gguf.Keys.IMatrix
_INT32 = struct.Struct("<i")
# An entry without a name and values.
_LEAST_ENTRY = 3 * _INT32.size


@dataclass(frozen=True)
class Entry:
    """What is known of one matrix, or of M that share a tensor, as experts do.

    Attributes:
        sums: of x_k^2, (M, K) fp32 on the CPU, finite and not negative.
        counts: how many tokens (in a .dat file: chunks) they are of, (M,) fp32.
        tensor: what an error message calls it.
    """

    sums: Tensor
    counts: Tensor
    tensor: str

    @property
    def means(self) -> Tensor:
        """The mean of x_k^2, (M, K) fp32; 0 where nothing was counted."""
        return self.sums / self.counts.clamp(min=1)[:, None]


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: by the name of the weight's tensor, as in "blk.0.attn_q.weight".
        datasets: what it was computed from.
        chunk_count, chunk_size: of so many chunks with so many tokens; 0 if the file does not say.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = field(default=())
    chunk_count: int = 0
    chunk_size: int = 0


def read(path: str | os.PathLike[str]) -> Imatrix:
    """Reads a file of either form.

    Raises:
        FileNotFoundError, PermissionError: it cannot be opened.
        ValueError: it is something else, cut or damaged; the message names file, tensor and value.
    """
    file = InputFile(path)
    if bytes(file.read(0, min(4, file.size))) == b"GGUF":
        found = _read_gguf(GGUFFile(path))
    else:
        try:
            found = _Legacy(file).read()
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    if not found.entries:
        raise ValueError(f"{path}: holds no entry; expected one for each matrix of a model")
    for entry in found.entries.values():
        _check(Path(path), entry)
    return found


def write(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Writes a GGUF file as llama.cpp's own program does. If anything raises, what was there stays.

    Raises:
        ValueError: an entry holds NaN, inf or negative values.
    """
    target = Path(path)
    for entry in imatrix.entries.values():
        _check(target, entry)
    with staged(target.parent, target.name) as place:
        writer = _Writer(place / target.name, "")
        try:
            writer.add_type(gguf.GGUFType.IMATRIX)
            # There is no array without elements.
            writer.add_array(_KEYS.DATASETS, list(imatrix.datasets) or [""])
            writer.add_uint32(_KEYS.CHUNK_COUNT, imatrix.chunk_count)
            writer.add_uint32(_KEYS.CHUNK_SIZE, imatrix.chunk_size)
            for name, entry in sorted(imatrix.entries.items()):
                sums, counts = entry.sums, entry.counts[:, None]
                if len(sums) == 1:  # ggml has no outer dimensions of 1
                    sums, counts = sums[0], counts[0]
                writer.add_tensor(name + _SUMS, contiguous(sums).numpy())
                writer.add_tensor(name + _COUNTS, contiguous(counts).numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        with open(place / target.name, "rb") as f:
            os.fsync(f.fileno())


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]
    def add_architecture(self) -> None:
        """Nothing: the file is of no architecture."""


def _check(path: Path, entry: Entry) -> None:
    for what, values in (("value", entry.sums), ("count", entry.counts)):
        bad = ~(torch.isfinite(values) & (values >= 0))
        if bool(bad.any()):
            at = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{path}: tensor {shown(entry.tensor)}: {what} {at[-1]} is {float(values[at])}; "
                "expected a finite number that is not negative"
            )


def _read_gguf(file: GGUFFile) -> Imatrix:
    kind = file.metadata.get(gguf.Keys.General.TYPE)
    if kind != gguf.GGUFType.IMATRIX:
        raise ValueError(f"{file.path}: general.type is {shown(kind)}; expected 'imatrix'")
    entries = {}
    for tensor in file.tensors:
        if tensor.endswith(_COUNTS) and tensor.removesuffix(_COUNTS) + _SUMS not in file.tensors:
            raise ValueError(
                f"{file.path}: tensor {shown(tensor.removesuffix(_COUNTS) + _SUMS)} is missing"
            )
        if tensor.endswith(_SUMS):
            name = tensor.removesuffix(_SUMS)
            entries[name] = _gguf_entry(file, tensor, name + _COUNTS)
    return Imatrix(
        entries, _datasets(file), _number(file, "CHUNK_COUNT"), _number(file, "CHUNK_SIZE")
    )


def _gguf_entry(file: GGUFFile, tensor: str, other: str) -> Entry:
    if other not in file.tensors:
        raise ValueError(f"{file.path}: tensor {shown(other)} is missing")
    for name in (tensor, other):
        if (kind := file.tensors[name].type) is not gguf.GGMLQuantizationType.F32:
            raise ValueError(
                f"{file.path}: tensor {shown(name)} has type {kind.name}; expected F32"
            )
    found = [values for name in (tensor, other) if isinstance(values := file[name], Tensor)]
    sums = found[0].reshape(-1, found[0].shape[-1])
    counts = found[1].flatten()
    if len(counts) not in (1, len(sums)):
        raise ValueError(
            f"{file.path}: tensor {shown(other)} has {len(counts)} values; expected {len(sums)} or 1"
        )
    return Entry(sums, counts.expand(len(sums)), tensor)


def _datasets(file: GGUFFile) -> tuple[str, ...]:
    found = file.metadata.get(_KEYS.DATASETS, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file.path}: {_KEYS.DATASETS} must be strings, got {shown(found)}")
    return tuple(found)


def _number(file: GGUFFile, which: str) -> int:
    key = getattr(_KEYS, which)
    value = file.metadata.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{file.path}: {key} must be an integer of at least 0, got {shown(value)}")
    return value


class _Legacy:
    """Reads a .dat file from its start to its end."""

    def __init__(self, file: InputFile) -> None:
        self.file, self.at = file, 0

    def read(self) -> Imatrix:
        count = self._int("the number of entries")
        if not 0 < count <= self.file.size // _LEAST_ENTRY:
            raise ValueError(
                f"is no imatrix: {count} entries do not fit in {self.file.size} bytes{kind_of(self.file)}"
            )
        entries: dict[str, Entry] = {}
        for i in range(count):
            name = self._text(f"the name of entry {i}")
            if name in entries:
                raise ValueError(f"entry {i}: tensor {shown(name)} is there twice")
            what = f"tensor {shown(name)}"
            calls = self._int(f"{what}: the number of calls")
            if calls < 0:
                raise ValueError(f"{what} has {calls} calls; expected at least 0")
            size = self._int(f"{what}: the number of values")
            if size < 1:
                raise ValueError(f"{what} has {size} values; expected at least 1")
            values = torch.frombuffer(
                self._bytes(4 * size, f"{what}: the values"), dtype=torch.float32
            )
            # As in llama.cpp: values without calls are means.
            counts = torch.tensor([max(calls, 1)], dtype=torch.float32, device="cpu")
            entries[name] = Entry(values[None], counts, name)
        if self.at == self.file.size:
            return Imatrix(entries)
        chunks = self._int("the number of chunks")
        datasets = () if self.at == self.file.size else (self._text("the dataset", least=0),)
        if self.at != self.file.size:
            raise ValueError(f"{self.file.size - self.at} bytes follow the end")
        return Imatrix(entries, datasets, max(chunks, 0))

    def _bytes(self, count: int, what: str) -> bytearray:
        try:
            data = self.file.read(self.at, count)
        except ValueError as e:
            raise ValueError(f"{what}: {e}: the file is cut or damaged") from e
        self.at += count
        return data

    def _int(self, what: str) -> int:
        value: int = _INT32.unpack(self._bytes(_INT32.size, what))[0]
        return value

    def _text(self, what: str, least: int = 1) -> str:
        length = self._int(what)
        if length < least:
            raise ValueError(f"{what} has {length} bytes; expected at least {least}")
        data = bytes(self._bytes(length, what))
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"{what} is no UTF-8: {shown(data)}") from e
