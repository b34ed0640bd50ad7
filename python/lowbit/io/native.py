"""What a lowbit checkpoint holds: safetensors files of canonical tensors and a JSON header that gives them meaning.

The metadata key "lowbit" holds {"version": 1, "layers": {module: {"format": spec, "shape": [N, K]}}, "tied": {}}. The
tensors of layer m are m.codes, m.scales, ... (`weights.quantized.file_specs`; in version 1 `tensor_specs`, and version
is 2 where the two differ); every other tensor is dense, the bias of a layer (m.bias) among them. "tied" maps names of
layers and dense tensors that are not stored to those that they share: {"lm_head": "model.embed_tokens"}. "extra", if it
is there, maps m._extra_state to its content (`extra_state.py`), whose tensors are m._extra_state.0, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.files import shown
from lowbit.formats import Format, as_format
from lowbit.io import extra_state
from lowbit.io.safetensors_file import Source, write
from lowbit.nn import states
from lowbit.packing import scale_bits
from lowbit.weights.quantized import TENSOR_NAMES, QuantTensor, file_specs, tensor_specs

_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Header:
    """What the metadata say: format and shape of each layer, the names that share another's tensors, the
    extra states that are no tensors, encoded, and whether integer scales of less than a byte are packed.
    """

    layers: dict[str, tuple[Format, tuple[int, int]]]
    tied: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    packs_scales: bool = True

    def metadata(self) -> dict[str, str]:
        """The header as safetensors metadata."""
        layers = {
            name: {"format": format.spec, "shape": list(shape)}
            for name, (format, shape) in self.layers.items()
        }
        packs = any(scale_bits(format) for format, _ in self.layers.values())
        content = {"version": _VERSIONS[packs], "layers": layers, "tied": self.tied}
        if self.extra:
            content["extra"] = self.extra
        return {"format": "pt", "lowbit": json.dumps(content, separators=(",", ":"))}


def prefix_of(name: str) -> str:
    """What stands before the names of a module's tensors."""
    return f"{name}." if name else ""


def layer_source(
    name: str, format: Format, shape: tuple[int, int], make: Callable[[], QuantTensor]
) -> Source:
    """The tensors of one layer, to be written."""
    prefix = prefix_of(name)
    specs = {prefix + key: spec for key, spec in file_specs(format, *shape).items()}
    return Source(specs, lambda: {prefix + key: t for key, t in make().to_file().items()})


def dense_source(name: str, t: Tensor) -> Source:
    """One dense tensor, to be written."""
    return Source({name: (tuple(t.shape), t.dtype)}, lambda: {name: t})


def write_checkpoint(
    path: Path,
    sources: list[Source],
    header: Header,
    metadata: Mapping[str, str] | None = None,
    *,
    marked: bool = False,
) -> None:
    """Writes one file of a checkpoint; `metadata` are entries besides the header's, and a file that
    transformers may come across is `marked` (`marker_of`).

    Raises:
        TypeError, ValueError: as `safetensors_file.write`; or a dense tensor has the name of a layer or of
            a tensor that a layer may have, and could not be told from it when the file is read.
            Nothing is written then.
    """
    check_names(sources, header)
    marker = [dense_source(name, t) for name, t in marker_of(header).items() if marked]
    write(path, [*sources, *marker], {**(metadata or {}), **header.metadata()})


def marker_of(header: Header) -> dict[str, Tensor]:
    """`states.MARKER` of the layer that sorts first, by its name; none without layers.

    An expert, m.0, comes last: without lowbit transformers has no tensor m.0.weight to compare it with.
    """
    first = min(
        header.layers, key=lambda name: (name.rpartition(".")[2].isdigit(), name), default=None
    )
    shape, dtype = states.MARKER
    empty = torch.empty(shape, dtype=dtype, device="cpu")
    return {} if first is None else {f"{prefix_of(first)}weight": empty}


def check_names(sources: list[Source], header: Header) -> None:
    """Raises ValueError if a dense tensor has the name of a layer, or of a tensor that a layer may have."""
    own = {
        prefix_of(layer) + key
        for layer, (format, shape) in header.layers.items()
        for key in tensor_specs(format, *shape)
    }
    taken = {
        name: layer
        for layer in header.layers
        for name in (layer, *(prefix_of(layer) + key for key in TENSOR_NAMES))
    }
    stored = {name for source in sources for name in source.specs}
    for name in sorted((stored - own | header.tied.keys()) & taken.keys()):
        raise ValueError(
            f"tensor {shown(name)} would be read as a part of the layer {shown(taken[name])}"
        )


def parse_header(file: Path, metadata: Mapping[str, str]) -> Header:
    """Reads and checks the header of one file.

    Raises:
        ValueError: it is missing, not what `Header.metadata` writes, of another version, or names
            an unknown format.
    """
    if "lowbit" not in metadata:
        raise ValueError(f"{file}: not a lowbit checkpoint, its metadata have no 'lowbit' entry")
    try:
        content = json.loads(metadata["lowbit"])
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: the 'lowbit' metadata are not JSON: {e}") from e
    version = content.get("version") if isinstance(content, dict) else content
    if not isinstance(content, dict) or version not in _VERSIONS:
        raise ValueError(f"{file}: version must be 1 or 2, got {shown(version)}")
    layers, tied, extra = (content.get(key, {}) for key in ("layers", "tied", "extra"))
    if "layers" not in content or not all(isinstance(v, dict) for v in (layers, tied, extra)):
        raise ValueError(f"{file}: 'layers' and 'tied' of the header must be objects, and 'extra'")
    for name in extra:
        if not extra_state.is_extra_state(name):
            raise ValueError(f"{file}: {shown(name)} is not the name of an extra state")
    for name, first in tied.items():
        if not isinstance(first, str):
            raise ValueError(
                f"{file}: {shown(name)} is tied to {shown(first)}, which is not a name"
            )
    parsed = {name: _parse_layer(file, name, entry) for name, entry in layers.items()}
    return Header(parsed, tied, extra, version == 2)


def _parse_layer(file: Path, name: str, entry: object) -> tuple[Format, tuple[int, int]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise ValueError(
            f"{file}: layer {shown(name)} must have a format and a shape, got {shown(entry)}"
        )
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(s) is int and 0 < s < 2**31 for s in shape)
    ):
        raise ValueError(
            f"{file}: layer {shown(name)}: shape must be two integers from 1 to 2^31 - 1, "
            f"got {shown(shape)}"
        )
    try:
        return as_format(entry["format"]), (shape[0], shape[1])
    except (ValueError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{file}: layer {shown(name)}: {e}") from e
