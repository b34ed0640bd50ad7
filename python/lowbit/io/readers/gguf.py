"""Reads GGUF files: block-quantized tensors stay packed, value for value; others come as dense
tensors.

`GGUFFile(path)` is a mapping from tensor name to `QuantTensor` or `Tensor`; nothing but the header
is read until a name is looked up, and then one tensor, a MiB at a time, into memory of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.io.readers.gguf_blocks import BLOCK_TYPES, DENSE_TYPES, BlockType
from lowbit.io.readers.gguf_header import GGUFTensor, read_header
from lowbit.packing import is_blocks, pack_codes
from lowbit.weights.quantized import QuantTensor, tensor_specs

# Bytes of blocks that are converted at a time.
_SLICE_BYTES = 1 << 20


class GGUFFile(Mapping[str, "QuantTensor | Tensor"]):
    """An open GGUF file; any part of a split file stands for all of them.

    Looking up a name returns a `QuantTensor` with the very values of the file for the types of
    `lowbit.io.readers.gguf_blocks`, and a dense tensor for F32, F16 and BF16. Other types raise
    NotImplementedError; damaged ones ValueError naming the file, the tensor and the value. Tensors
    are copies: what happens to the file later does not change them.

    Attributes:
        path: the file.
        files: the paths of the file, or of all parts of a split one.
        metadata: the key-value pairs; an array is a numpy array, or a list of strings or arrays.
        tensors: a `GGUFTensor` for every tensor, in file order.
        plain: whether all strings are UTF-8 and no array holds arrays, which others cannot read.

    Raises:
        FileNotFoundError, PermissionError: the file cannot be opened.
        ValueError: it is damaged or something else, or a part is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self._files = header.files
        self.files = [file.path for file in header.files]
        self.metadata = header.metadata
        self.tensors = header.tensors
        self.plain = header.plain

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> QuantTensor | Tensor:
        info = self.tensors[name]
        if info.type in BLOCK_TYPES and len(info.shape) != 2:
            raise NotImplementedError(
                f"{self.files[info.part]}: tensor {shown(name)} ({info.type.name}) has shape "
                f"{info.shape}; expected two dimensions"
            )
        found = self.rows(name, range(math.prod(info.shape[:-1])), info.shape[-1])
        return found if isinstance(found, QuantTensor) else found.view(info.shape)

    def rows(self, name: str, rows: range, columns: int) -> QuantTensor | Tensor:
        """Some rows of a tensor as a matrix, read without the others: those of one of many experts.

        Args:
            name: of a tensor of any number of dimensions.
            rows: which ones, with a step of 1.
            columns: of the matrix; of a block type, those of the tensor.

        Returns:
            (len(rows), columns), as a look-up; errors too.

        Example:
            >>> file.rows("blk.0.ffn_up_exps.weight", range(2 * n, 3 * n), k)  # doctest: +SKIP
        """
        info = self.tensors[name]
        self._check_rows(info, rows, columns)
        try:
            if info.type in DENSE_TYPES:
                return self._read_dense(info, rows, columns)
            if info.type in BLOCK_TYPES:
                return self._read_blocks(info, BLOCK_TYPES[info.type], rows)
        except ValueError as e:
            raise ValueError(
                f"{self.files[info.part]}: tensor {shown(name)} ({info.type.name}): {e}"
            ) from e
        supported = ", ".join(t.name for t in (*BLOCK_TYPES, *DENSE_TYPES))
        raise NotImplementedError(
            f"{self.files[info.part]}: tensor {shown(name)} has type {info.type.name}; "
            f"expected one of {supported}"
        )

    def dequantized(self, name: str, rows: range | None = None) -> Tensor:
        """The fp32 values of a tensor of any type that package `gguf` knows, or of some `rows` as a matrix; errors as a
        look-up.
        """
        info = self.tensors[name]
        columns, shape = info.shape[-1], info.shape
        if rows is not None:
            self._check_rows(info, rows, columns)
            shape = (len(rows), columns)
        data = self._rows_bytes(info, rows or range(math.prod(shape[:-1])), columns)
        try:
            values = gguf.dequantize(data.reshape(*shape[:-1], -1), info.type)
        except (NotImplementedError, KeyError) as e:
            raise NotImplementedError(
                f"{self.files[info.part]}: package gguf cannot dequantize tensor {shown(name)} of "
                f"type {info.type.name}"
            ) from e
        out = torch.from_numpy(np.asarray(values, np.float32))
        if not bool(torch.isfinite(out).all()):
            raise ValueError(
                f"{self.files[info.part]}: tensor {shown(name)} ({info.type.name}): the values "
                "hold NaN or inf"
            )
        return out

    def _check_rows(self, info: GGUFTensor, rows: range, columns: int) -> None:
        weights = math.prod(info.shape)
        fits = columns == info.shape[-1] or (info.type in DENSE_TYPES and weights % columns == 0)
        if not fits or rows.step != 1 or not 0 <= rows.start < rows.stop <= weights // columns:
            raise ValueError(
                f"rows must be some of a matrix that tensor {shown(info.name)} of shape {info.shape} holds, got {rows} "
                f"of {columns} columns"
            )

    def _read_dense(self, info: GGUFTensor, rows: range, columns: int) -> Tensor:
        data = torch.from_numpy(self._rows_bytes(info, rows, columns))
        out = data.view(DENSE_TYPES[info.type]).view(len(rows), columns)
        if not bool(torch.isfinite(out).all()):
            raise ValueError("the values hold NaN or inf")
        return out

    def _read_blocks(self, info: GGUFTensor, block: BlockType, rows: range) -> QuantTensor:
        n, k = len(rows), info.shape[-1]
        fmt = block.format
        out = {
            key: torch.empty(shape, dtype=dtype, device="cpu")
            for key, (shape, dtype) in tensor_specs(fmt, n, k).items()
        }
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
        step = max(1, _SLICE_BYTES // (info.nbytes * k // math.prod(info.shape)))
        for start in range(0, n, step):
            stop = min(n, start + step)
            data = self._rows_bytes(info, rows[start:stop], k)
            # What is not finite is found below.
            with np.errstate(invalid="ignore"):
                parts = block.split(data.reshape(-1, block_bytes))
            codes = torch.from_numpy(parts.codes.reshape(stop - start, -1))
            as_stored = fmt.bits == 8 or is_blocks(fmt)
            out["codes"][start:stop] = codes if as_stored else pack_codes(codes, fmt)
            for key, values in parts._asdict().items():
                if key != "codes" and values is not None:
                    stored = torch.from_numpy(values).view(out[key].dtype)
                    out[key][start:stop] = stored.view(stop - start, -1)
        if fmt.scale == "e4m3":
            # What multiplies a tensor as a whole is a tensor of its own in the file.
            out["scales2"].fill_(1)
        return QuantTensor(fmt, (n, k), out).validate()

    def _rows_bytes(self, info: GGUFTensor, rows: range, columns: int) -> np.ndarray[Any, Any]:
        size = info.nbytes * columns // math.prod(info.shape)  # of a row
        return np.frombuffer(self._bytes(info, rows.start * size, len(rows) * size), np.uint8)

    def _bytes(self, info: GGUFTensor, offset: int, count: int) -> bytearray:
        return self._files[info.part].read(info.offset + offset, count)
