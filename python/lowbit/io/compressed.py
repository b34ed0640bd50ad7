"""Files of pruned weights, entropy-coded (Deep Compression, Han et al. 2016, arXiv 1510.00149, section 4).

A file is 8 bytes of `MAGIC`, the length of the header and its CRC-32 (uint32 each, little-endian like all numbers), the
header as JSON, and for each tensor its data: of a pruned matrix the table (fp32), the lengths of the Huffman codes of
codes and of gaps (a byte each), and their words (uint32); of another tensor its bytes. The header has for each name
"shape", "crc" and "words", two counts, with "bits", "index_bits" and "entries", or "dtype".
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.files import shown, write_atomically
from lowbit.io import huffman
from lowbit.strides import bytes_of
from lowbit.weights.pruned import PrunedTensor

MAGIC = b"LBPRUNE1"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MOST_ENTRIES = 1 << 40


def save_pruned(
    path: str | os.PathLike[str], tensors: Mapping[str, PrunedTensor | Tensor]
) -> dict[str, int]:
    """Writes pruned matrices and other tensors, as biases, to one file.

    Args:
        path: of the file, which appears as a whole or not at all.
        tensors: by name; dense ones in fp32, fp16 or bf16.

    Returns:
        The bytes of each in the file, and those of the header as "".

    Raises:
        TypeError: a tensor is neither.
        ImportError: constriction is not installed.

    Example:
        >>> save_pruned("m.lbp", {"0.weight": PrunedTensor.of(model[0].quant_tensor()), "0.bias": model[0].bias})
    """
    header: dict[str, dict[str, Any]] = {}
    parts: dict[str, bytes] = {}
    for name, t in tensors.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"tensors must have names, got {name!r}")
        if isinstance(t, PrunedTensor):
            header[name], parts[name] = _pruned(t)
        elif isinstance(t, Tensor) and t.dtype in _DTYPES.values():
            header[name], parts[name] = _dense(t)
        else:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a PrunedTensor or a tensor in {[*_DTYPES]}, got {got}")
        header[name]["crc"] = zlib.crc32(parts[name])
    text = json.dumps(header, separators=(",", ":")).encode()
    start = MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text
    write_atomically(path, lambda file: file.write(b"".join((start, *parts.values()))))
    return {"": len(start)} | {name: len(part) for name, part in parts.items()}


def load_pruned(path: str | os.PathLike[str]) -> dict[str, PrunedTensor | Tensor]:
    """What `save_pruned` wrote, bit for bit, on the CPU.

    Raises:
        ValueError: the file is no such file, cut short, longer than its header says, or damaged: the message names the
            tensor and what is wrong.
        ImportError: constriction is not installed.
    """
    data = Path(path).read_bytes()
    begin = len(MAGIC) + 8
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path}: not a file of pruned weights, it does not begin with {MAGIC!r}")
    if len(data) < begin:
        raise ValueError(f"{path}: cut short, it ends within its first {begin} bytes")
    size, crc = struct.unpack_from("<II", data, len(MAGIC))
    text = data[begin : begin + size]
    if len(text) < size:
        raise ValueError(f"{path}: cut short, it ends within the header of {size} bytes")
    if zlib.crc32(text) != crc:
        raise ValueError(f"{path}: the header is damaged, its checksum is wrong")
    at, found = begin + size, {}
    for name, entry in json.loads(text).items():
        try:
            length = _length(entry)
            part = data[at : at + length]
            if len(part) < length:
                raise ValueError(f"cut short, {len(part)} of {length} bytes are there")
            if zlib.crc32(part) != entry["crc"]:
                raise ValueError("damaged, its checksum is wrong")
            found[name] = _read(entry, part)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}: {shown(name)}: {e}") from e
        at += length
    if at != len(data):
        raise ValueError(f"{path}: {len(data) - at} bytes follow the last tensor")
    return found


def _pruned(t: PrunedTensor) -> tuple[dict[str, Any], bytes]:
    head: dict[str, Any] = {"shape": list(t.shape), "bits": t.bits, "index_bits": t.index_bits}
    head |= {"entries": len(t.codes), "words": [0, 0]}
    parts = [t.table.cpu().numpy().astype("<f4").tobytes()]
    words = []
    if len(t.codes):
        for i, (symbols, width) in enumerate(((t.codes, t.bits), (t.gaps, t.index_bits))):
            lengths, stream = huffman.encode(symbols.cpu().numpy(), 2**width)
            parts.append(lengths.tobytes())
            words.append(stream.astype("<u4").tobytes())
            head["words"][i] = len(stream)
    return head, b"".join((*parts, *words))


def _dense(t: Tensor) -> tuple[dict[str, Any], bytes]:
    dtype = next(name for name, each in _DTYPES.items() if each == t.dtype)
    return {"shape": list(t.shape), "dtype": dtype}, bytes_of(t).numpy().tobytes()


def _length(entry: dict[str, Any]) -> int:
    """The bytes of a tensor, by its header, which is checked."""
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(_is_count(s) for s in shape):
        raise ValueError(f"shape must be sizes, got {shown(shape)}")
    if "dtype" in entry:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"dtype must be one of {[*_DTYPES]}, got {shown(entry['dtype'])}")
        return math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
    numbers = [entry["bits"], entry["index_bits"], entry["entries"], *entry["words"]]
    if not all(map(_is_count, numbers)) or len(numbers) != 5 or max(numbers[:2]) > 8:
        raise ValueError(f"bits, index_bits, entries and words must be counts, got {numbers}")
    bits, index_bits, entries, *words = numbers
    return 4 * 2**bits + (2**bits + 2**index_bits if entries else 0) + 4 * sum(words)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_ENTRIES


def _read(entry: dict[str, Any], part: bytes) -> PrunedTensor | Tensor:
    shape = tuple(entry["shape"])
    if "dtype" in entry:
        raw = torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else None
        if raw is None:
            return torch.empty(shape, dtype=_DTYPES[entry["dtype"]], device="cpu")
        return raw.view(_DTYPES[entry["dtype"]]).view(shape)
    bits, index_bits, entries = entry["bits"], entry["index_bits"], entry["entries"]
    table = torch.from_numpy(np.frombuffer(part, "<f4", 2**bits).astype(np.float32))
    streams = [np.zeros(0, np.uint8), np.zeros(0, np.uint8)]
    if entries:
        lengths_at, words_at = 4 * 2**bits, 4 * 2**bits + 2**bits + 2**index_bits
        each = zip(("codes", "gaps"), (bits, index_bits), entry["words"], strict=True)
        for i, (name, width, count) in enumerate(each):
            lengths = np.frombuffer(part, np.uint8, 2**width, lengths_at)
            words = np.frombuffer(part, "<u4", count, words_at)
            try:
                streams[i] = huffman.decode(lengths, words, entries)
            except ValueError as e:
                raise ValueError(f"bad Huffman code of {name}: {e}") from e
            lengths_at, words_at = lengths_at + 2**width, words_at + 4 * count
    codes, gaps = map(torch.from_numpy, streams)
    return PrunedTensor(shape, table, codes, gaps, index_bits)
