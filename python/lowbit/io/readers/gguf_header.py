"""The header of a GGUF file: metadata, and where each tensor lies.

Every length and offset is checked against the size of the file. Parts of a split file are read
together.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from lowbit.files import InputFile, kind_of, shown

# A header entry takes some hundred bytes of Python objects; the largest models have some thousands.
_MAX_ENTRIES = 1 << 17
_MAX_DIMS = 4  # GGML_MAX_DIMS
_VERSIONS = (2, 3)
_CHUNK_BYTES = 1 << 20
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# Characters of both struct, which reads one number faster, and numpy.
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in torch's order, GGUF's reversed; `offset` in the file, the
    `part` of a split one.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        files: the file, or all parts of a split one, open.
        metadata: the key-value pairs, of the first part; an array is a numpy array, or a list of
            strings or arrays. In strings, bytes that are not UTF-8 become escapes such as \\xff.
        tensors: by name, in file order.
        plain: whether all strings are UTF-8 and no array holds arrays, which others cannot read.
    """

    files: list[InputFile]
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]
    plain: bool


def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file, and of all other parts if it is one part of a split file.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: it is damaged or something else, or a part is missing; the message names file
            and value.
    """
    header = _read_part(path, 0)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return header
    paths = _part_paths(path, header.metadata)
    parts = [_read_part(p, i) for i, p in enumerate(paths)]
    merged = Header([f for p in parts for f in p.files], parts[0].metadata, {}, parts[0].plain)
    for i, (part, part_path) in enumerate(zip(parts, paths, strict=True)):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (i, count):
            raise ValueError(
                f"{part_path}: split.no and split.count must be {i} and {count}, got {shown(said)}"
            )
        for name in part.tensors.keys() & merged.tensors.keys():
            raise ValueError(f"{part_path}: tensor {shown(name)} is in an earlier part too")
        merged.tensors.update(part.tensors)
    expected = merged.metadata.get("split.tensors.count", len(merged.tensors))
    if expected != len(merged.tensors):
        raise ValueError(
            f"{paths[0]}: split.tensors.count is {shown(expected)}, the parts hold "
            f"{len(merged.tensors)} tensors"
        )
    return merged


def _part_paths(path: Path, metadata: Mapping[str, object]) -> list[Path]:
    count = metadata["split.count"]
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{path}: is one of {shown(count)} parts of a split file, whose names must be "
            "NAME-00001-of-0000N.gguf with N parts"
        )
    paths = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not os.path.isfile(p)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path}: is one of {count} parts of a split file, and {', '.join(missing[:3])}{more} "
            "must lie beside it"
        )
    return paths


def _read_part(path: Path, part: int) -> Header:
    file = InputFile(path)
    try:
        return _Parser(file, part).header
    # Deep arrays of arrays.
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a readable GGUF file: {e}") from e


class _Parser:
    """Reads a header from front to end, a MiB at a time."""

    def __init__(self, file: InputFile, part: int) -> None:
        self._file, self._at = file, 0
        self._chunk, self._start = bytearray(), 0
        self._plain = True
        version = self._version()
        tensors, fields = (self._count(f"GGUF.{name}_count") for name in ("tensor", "kv"))
        metadata: dict[str, object] = {
            "GGUF.version": version,
            "GGUF.tensor_count": tensors,
            "GGUF.kv_count": fields,
        }
        for _ in range(fields):
            name = self._name()
            if name in metadata:
                raise ValueError(f"Duplicate key {shown(name)}")
            metadata[name] = self._value(self._type())
        entries = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment must be a power of two, got {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        infos: dict[str, GGUFTensor] = {}
        for name, dims, kind, offset in entries:
            info = _tensor_info(name, dims, kind, start + offset, part)
            if name in infos:
                raise ValueError(f"tensor {shown(name)} appears twice")
            if info.offset + info.nbytes > file.size:
                raise ValueError(
                    f"tensor {shown(name)} takes bytes {info.offset} to "
                    f"{info.offset + info.nbytes}, outside the file of {file.size} bytes"
                )
            infos[name] = info
        self.header = Header([file], metadata, infos, self._plain)

    def _version(self) -> int:
        if self._file.size == 0:
            raise ValueError("the file is empty")
        magic = bytes(self._take(4))
        if magic != b"GGUF":
            kind = kind_of(self._file)
            if self._file.size >= 10 and self._file.read(8, 2) == b'{"':
                kind = ": it is a safetensors file"
            raise ValueError(f"its magic is {magic!r}, not b'GGUF'{kind}")
        version = int(_U32.unpack(self._take(4))[0])
        if version not in _VERSIONS and version & 0xFFFF == 0:
            raise ValueError(
                "the file is big-endian, written for another kind of machine; convert it with "
                "gguf-convert-endian of package gguf"
            )
        if version not in _VERSIONS:
            raise ValueError(f"the version of GGUF must be one of {_VERSIONS}, got {version}")
        return version

    def _take(self, count: int) -> bytearray:
        """The next `count` bytes."""
        begin = self._at - self._start
        if begin + count > len(self._chunk):
            # Raises where the file ends before them.
            size = max(count, min(_CHUNK_BYTES, self._file.size - self._at))
            self._chunk, self._start, begin = self._file.read(self._at, size), self._at, 0
        self._at += count
        return self._chunk[begin : begin + count]

    def _count(self, name: str) -> int:
        count = int(_U64.unpack(self._take(8))[0])
        if count > _MAX_ENTRIES:
            raise ValueError(f"{name} must be at most {_MAX_ENTRIES}, got {count}")
        return count

    def _string(self) -> bytearray:
        return self._take(_U64.unpack(self._take(8))[0])

    def _name(self) -> str:
        return self._string().decode()

    def _type(self) -> GGUFValueType:
        return GGUFValueType(_U32.unpack(self._take(4))[0])

    def _value(self, kind: GGUFValueType) -> object:
        if kind == GGUFValueType.STRING:
            return self._text(self._string())
        if kind != GGUFValueType.ARRAY:
            number = f"<{_SCALARS[kind]}"
            return struct.unpack(number, self._take(struct.calcsize(number)))[0]
        item = self._type()
        count = int(_U64.unpack(self._take(8))[0])
        if item in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[item]}")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if item == GGUFValueType.STRING:
            return self._texts(count)
        self._plain &= item != GGUFValueType.ARRAY
        # Each takes some bytes of the file: no count outlasts it.
        return [self._value(item) for _ in range(count)]

    def _text(self, raw: bytearray) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # Vocabularies hold pieces of characters.
            self._plain = False
            return raw.decode(errors="backslashreplace")

    def _texts(self, count: int) -> list[str]:
        """Strings in a row; those that lie whole in the chunk without a call for each: vocabularies are long."""
        texts: list[str] = []
        while len(texts) < count:
            chunk, begin = self._chunk, self._at - self._start
            most = len(chunk) - 8
            while len(texts) < count and begin <= most:
                end = begin + 8 + _U64.unpack_from(chunk, begin)[0]
                if end > len(chunk):
                    break
                texts.append(self._text(chunk[begin + 8 : end]))
                begin = end
            self._at = self._start + begin
            if len(texts) < count:
                texts.append(self._text(self._string()))
        return texts

    def _entry(self) -> tuple[str, list[int], int, int]:
        name = self._name()
        (rank,) = _U32.unpack(self._take(4))
        if not 1 <= rank <= _MAX_DIMS:
            raise ValueError(
                f"tensor {shown(name)} must have 1 to {_MAX_DIMS} dimensions, got {rank}"
            )
        *dims, kind, offset = struct.unpack(f"<{rank}QIQ", self._take(8 * rank + 12))
        return name, dims, kind, offset


def _tensor_info(name: str, dims: list[int], kind: int, offset: int, part: int) -> GGUFTensor:
    try:
        ggml_type = GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {shown(name)} has the unknown type {kind}") from None
    if min(dims) < 1:
        raise ValueError(
            f"tensor {shown(name)} must have 1 to {_MAX_DIMS} positive dimensions, got {dims}"
        )
    if dims[0] % block:
        raise ValueError(
            f"tensor {shown(name)} ({ggml_type.name}) has rows of {dims[0]} weights; "
            f"expected a multiple of {block}"
        )
    nbytes = math.prod(dims) // block * block_bytes
    return GGUFTensor(name, ggml_type, tuple(reversed(dims)), offset, nbytes, part)
