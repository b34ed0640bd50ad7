"""Reads GGUF files: block-quantized tensors stay packed, value for value; others come as dense
tensors.

`GGUFFile(path)` is a mapping from tensor name to `QuantTensor` or `Tensor`; nothing but the header
is read until a name is looked up, and then one tensor, a MiB at a time. Package `gguf` parses the
header; every length and offset in it is checked against the size of the file first, so a damaged
file gives a ValueError.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.packing import pack_codes
from lowbit.tensor import QuantTensor, tensor_specs

Array = np.ndarray[Any, Any]

# Bytes of blocks that are converted at a time.
_SLICE_BYTES = 1 << 20
# A header entry takes about a kilobyte of Python objects; the largest models have some thousands.
_MAX_ENTRIES = 1 << 17
_MAX_DIMS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in torch's order, GGUF's reversed; `offset` in the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _nibbles(qs: Array) -> Array:  # (B, 16) -> (B, 32)
    """Codes of a ggml block: low nibbles are weights 0..15, high nibbles 16..31."""
    return np.concatenate((qs & 15, qs >> 4), axis=1)


def _fifth_bits(qh: Array) -> Array:  # (B, 4) -> (B, 32)
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _tq2_codes(qs: Array) -> Array:  # (B, 64) -> (B, 256)
    """Weight i lies in byte 32 * (i / 128) + i % 32, in the bit pair (i % 128) / 32."""
    half = qs.reshape(-1, 2, 1, 32)
    pairs = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    return ((half >> pairs) & 3).reshape(-1, 256)


@dataclass(frozen=True)
class _BlockType:
    """How a block's bytes split into codes (uint8, one per weight), scales and minima."""

    format: str
    codes: Callable[[Array], Array]
    scale: slice
    zero: slice | None = None


# Byte layouts of ggml-common.h.
_BLOCK_TYPES = {
    GGMLQuantizationType.Q4_0: _BlockType("q4_0", lambda b: _nibbles(b[:, 2:]), slice(0, 2)),
    GGMLQuantizationType.Q4_1: _BlockType(
        "q4_1", lambda b: _nibbles(b[:, 4:]), slice(0, 2), slice(2, 4)
    ),
    GGMLQuantizationType.Q5_0: _BlockType(
        "q5_0", lambda b: _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), slice(0, 2)
    ),
    GGMLQuantizationType.Q5_1: _BlockType(
        "q5_1", lambda b: _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), slice(0, 2), slice(2, 4)
    ),
    # Two's complement to offset binary.
    GGMLQuantizationType.Q8_0: _BlockType("q8_0", lambda b: b[:, 2:] ^ 0x80, slice(0, 2)),
    GGMLQuantizationType.IQ4_NL: _BlockType("iq4_nl", lambda b: _nibbles(b[:, 2:]), slice(0, 2)),
    GGMLQuantizationType.TQ2_0: _BlockType("tq2_0", lambda b: _tq2_codes(b[:, :64]), slice(64, 66)),
    GGMLQuantizationType.MXFP4: _BlockType("mxfp4", lambda b: _nibbles(b[:, 1:]), slice(0, 1)),
}
_DENSE_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GGUFFile(Mapping[str, "QuantTensor | Tensor"]):
    """An open GGUF file.

    Looking up a name returns a `QuantTensor` for Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, TQ2_0 and
    MXFP4 (formats of the same names, scales as stored) and a dense tensor for F32, F16 and BF16.
    Other types raise NotImplementedError; damaged ones ValueError naming the file, the tensor and
    the value.

    Attributes:
        path: the file.
        metadata: the key-value pairs; an array is a list of strings or a numpy array.
        tensors: a `TensorInfo` for every tensor, in file order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            header = _Header(self.path)
        # What GGUFReader and numpy raise on damage; a ValueError already says what is wrong.
        except (ValueError, KeyError, IndexError, OverflowError, RecursionError, TypeError) as e:
            raise ValueError(f"{self.path}: not a readable GGUF file: {e}") from e
        self.metadata: dict[str, object] = header.metadata
        self.tensors: dict[str, TensorInfo] = header.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> QuantTensor | Tensor:
        info = self.tensors[name]
        try:
            if info.type in _DENSE_TYPES:
                return self._read_dense(info)
            if info.type in _BLOCK_TYPES:
                return self._read_blocks(info, _BLOCK_TYPES[info.type])
        except ValueError as e:
            raise ValueError(f"{self.path}: tensor {name!r} ({info.type.name}): {e}") from e
        supported = ", ".join(t.name for t in (*_BLOCK_TYPES, *_DENSE_TYPES))
        raise NotImplementedError(
            f"{self.path}: tensor {name!r} has type {info.type.name}; expected one of {supported}"
        )

    def _read_dense(self, info: TensorInfo) -> Tensor:
        data = torch.from_numpy(self._bytes(info.offset, info.nbytes))
        out = data.view(_DENSE_TYPES[info.type]).view(info.shape)
        if not bool(torch.isfinite(out).all()):
            raise ValueError("the values hold NaN or inf")
        return out

    def _read_blocks(self, info: TensorInfo, block: _BlockType) -> QuantTensor:
        if len(info.shape) != 2:
            raise NotImplementedError(
                f"{self.path}: tensor {info.name!r} ({info.type.name}) has shape {info.shape}; "
                "expected two dimensions"
            )
        n, k = info.shape
        fmt = FORMATS[block.format]
        out = {
            key: torch.empty(shape, dtype=dtype, device="cpu")
            for key, (shape, dtype) in tensor_specs(fmt, n, k).items()
        }
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
        row_bytes = info.nbytes // n
        step = max(1, _SLICE_BYTES // row_bytes)
        for start in range(0, n, step):
            stop = min(n, start + step)
            data = self._bytes(info.offset + start * row_bytes, (stop - start) * row_bytes)
            blocks = data.reshape(-1, block_bytes)
            codes = torch.from_numpy(block.codes(blocks).reshape(stop - start, k))
            # 4-bit rows are whole bytes of two nibbles: no need for the general bit stream.
            out["codes"][start:stop] = (
                codes[:, 0::2] | codes[:, 1::2] << 4 if fmt.bits == 4 else
                codes if fmt.bits == 8 else pack_codes(codes, fmt)
            )  # fmt: skip
            for key, place in (("scales", block.scale), ("zeros", block.zero)):
                if place is not None:
                    field = torch.from_numpy(np.ascontiguousarray(blocks[:, place]))
                    out[key][start:stop] = field.view(out[key].dtype).view(stop - start, -1)
        return QuantTensor(fmt, (n, k), out).validate()

    def _bytes(self, offset: int, count: int) -> Array:
        data = np.fromfile(self.path, np.uint8, count, offset=offset)
        if len(data) != count:
            raise ValueError(f"the file ends {count - len(data)} bytes before the tensor does")
        return data


class _Header(gguf.GGUFReader):
    """GGUFReader that checks each read against the end of the file and never touches the tensors'
    data.

    Arrays are read in one step: the base class makes two numpy objects per element, which for a
    vocabulary takes seconds and a hundred MiB.
    """

    def __init__(self, path: Path) -> None:
        self.infos: dict[str, TensorInfo] = {}
        super().__init__(path)
        if self.byte_order == "S":
            raise ValueError("byte order is not that of this machine")
        self.metadata: dict[str, object] = {
            name: field.parts[-1] if field.types[0] == GGUFValueType.ARRAY else field.contents()
            for name, field in self.fields.items()
        }

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> Array:  # a slice past the end would come back short
        size = int(count) * np.dtype(dtype).itemsize
        if int(offset) + size > len(self.data):
            raise ValueError(
                f"{size} bytes at offset {offset} lie outside the file of {len(self.data)} bytes"
            )
        return super()._get(int(offset), dtype, int(count), override_order)

    def _push_field(self, field: gguf.ReaderField, skip_sum: bool = False) -> int:
        if field.name in ("GGUF.tensor_count", "GGUF.kv_count"):
            count = int(field.parts[0][0])
            if count > _MAX_ENTRIES:
                raise ValueError(f"{field.name} must be at most {_MAX_ENTRIES}, got {count}")
        return super()._push_field(field, skip_sum)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item == GGUFValueType.STRING:
            values, stop = self._strings(start, count)
        elif item == GGUFValueType.ARRAY:
            raise ValueError("arrays of arrays are not supported")
        else:
            values = np.array(self._get(start, self.gguf_scalar_to_np[item], count))
            stop = start + values.nbytes
        return stop - orig_offs, [values], [0], [GGUFValueType.ARRAY, item]

    def _strings(self, start: int, count: int) -> tuple[Any, int]:
        blob: Any = memoryview(self.data)  # type: ignore[arg-type]
        values = []
        for _ in range(count):
            if start + 8 > len(blob):
                raise ValueError(f"an array of {count} strings runs past the end of the file")
            (length,) = struct.unpack_from("<Q", blob, start)
            start += 8
            if start + length > len(blob):
                raise ValueError(f"a string of {length} bytes runs past the end of the file")
            values.append(str(blob[start : start + length], "utf-8"))
            start += length
        return values, start

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            dims, raw_type, offset = (part.tolist() for part in field.parts[3:])
            info = _tensor_info(field.name, dims, raw_type[0], int(start_offs) + offset[0])
            if info.name in self.infos:
                raise ValueError(f"tensor {info.name!r} appears twice")
            if info.offset + info.nbytes > len(self.data):
                stop = info.offset + info.nbytes
                raise ValueError(
                    f"tensor {info.name!r} takes bytes {info.offset} to {stop}, "
                    f"outside the file of {len(self.data)} bytes"
                )
            self.infos[info.name] = info


def _tensor_info(name: str, dims: list[int], raw_type: int, offset: int) -> TensorInfo:
    try:
        ggml_type = GGMLQuantizationType(raw_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name!r} has the unknown type {raw_type}") from None
    if not 1 <= len(dims) <= _MAX_DIMS or min(dims) < 1:
        raise ValueError(
            f"tensor {name!r} must have 1 to {_MAX_DIMS} positive dimensions, got {dims}"
        )
    if dims[0] % block:
        raise ValueError(
            f"tensor {name!r} ({ggml_type.name}) has rows of {dims[0]} weights; "
            f"expected a multiple of {block}"
        )
    nbytes = math.prod(dims) // block * block_bytes
    return TensorInfo(name, ggml_type, tuple(reversed(dims)), offset, nbytes)
