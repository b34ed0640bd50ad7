"""A checkpoint in several files, with the index that transformers and `tensor_files` read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from lowbit.files import shown, staged, write_atomically
from lowbit.io.native import Header, check_names, prefix_of, write_checkpoint
from lowbit.io.safetensors_file import FILE_NAME, INDEX_NAME, Source

_UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or a text such as "5GB" or "500 MiB".

    Raises:
        ValueError: it is none, or below 1.
    """
    found = size
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        found = int(float(match[1]) * _UNITS[match[2].upper()])
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(
            f"max_shard_size must be a positive number of bytes, or a text as in '5GB', got {shown(size)}"
        )
    return found


def write_shards(
    folder: Path, sources: list[Source], header: Header, limit: int, *, marked: bool = False
) -> Path:
    """Writes a checkpoint to a folder, in files of at most `limit` bytes of tensors; the tensors of one layer stay
    together, whatever they take. If they fit one file, it has no index.

    Returns:
        The path of the file, or of the index.

    Raises:
        TypeError, ValueError: as `write_checkpoint`; or the folder holds a checkpoint in one file, which would be
            read instead of the index. No file is written then.
    """
    check_names(sources, header)
    parts = _split(sources, limit)
    if len(parts) == 1:
        write_checkpoint(folder / FILE_NAME, sources, header, marked=marked)
        return folder / FILE_NAME
    if (folder / FILE_NAME).exists():
        raise ValueError(f"path must hold no other checkpoint, got {folder / FILE_NAME}")
    weight_map: dict[str, str] = {}
    with staged(folder, INDEX_NAME) as place:
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
            names = {name for source in part for name in source.specs}
            # Names of other files' tensors may stand in any header: they are read together.
            tied, extra = ({}, {}) if i else (header.tied, header.extra)
            layers = {
                name: how
                for name, how in header.layers.items()
                if f"{prefix_of(name)}codes" in names
            }
            write_checkpoint(place / file, part, Header(layers, tied, extra), marked=marked)
            weight_map.update(dict.fromkeys(names, file))
        total = sum(map(_size, sources))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True).encode()
        write_atomically(place / INDEX_NAME, lambda f: f.write(text))
    return folder / INDEX_NAME


def _size(source: Source) -> int:
    return sum(torch.Size(shape).numel() * d.itemsize for shape, d in source.specs.values())


def _split(sources: list[Source], limit: int) -> list[list[Source]]:
    """In order, as many as fit; at least one."""
    parts: list[list[Source]] = [[]]
    filled = 0
    for source in sources:
        size = _size(source)
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(source)
        filled += size
    return parts
