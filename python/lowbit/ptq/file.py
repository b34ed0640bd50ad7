"""quantize_file: a dense safetensors checkpoint in, a quantized one out, one tensor in memory at a
time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.files import staged, write_atomically
from lowbit.formats import Format
from lowbit.io.foreign import CONFIG_NAME
from lowbit.io.native import Header, layer_source, write_checkpoint
from lowbit.io.readers.dense import WEIGHT_DTYPES, DenseFile, DenseReader
from lowbit.io.safetensors_file import FILE_NAME, INDEX_NAME, Source, tensor_files
from lowbit.nn.names import FILE_SKIP, Rule, Rules, Selection
from lowbit.ptq.model import Method, check_rules
from lowbit.ptq.progress import bar
from lowbit.ptq.report import Report, measure
from lowbit.weights.quantized import QuantTensor

_WEIGHT = ".weight"
# Besides tensors, what a folder needs to be loaded.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE")


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: Rules,
    *,
    skip: Iterable[str] = FILE_SKIP,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    obstacles: Mapping[str, str] | None = None,
    progress: bool = True,
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> Report:
    """Quantizes a checkpoint on disk without building its model.

    Quantized are two-dimensional fp32, fp16, bf16 or fp64 tensors named "*.weight", but for those
    of skipped modules; everything else is copied. Of a folder the files are read that transformers
    loads (`tensor_files`). A file does not tell an nn.Linear from another
    module with a matrix (an embedding under an unusual name, the transposed Conv1D of GPT-2): name
    those in `skip`, or `lowbit.load` will refuse the file.

    Args:
        src: a .safetensors file, or a folder with model.safetensors or an index.
        dst: for a file, a file; for a folder, another folder (made if needed), which also gets the
            configuration and tokenizer files. If anything raises, `dst` is as it was.
        format: one format or a recipe, as in `lowbit.quantize_model`; patterns are matched against
            the name without ".weight".
        skip: patterns of modules to leave; by default heads, embeddings and norms.
        method, options, on_layer: as in `lowbit.quantize_model`; no model runs, so methods that
            need calibration are refused, and so is "nuuq", which makes formats of its own.
        dtype: what fp64, fp32, fp16 and bf16 tensors are converted to as they are read; None keeps
            what each has.
        obstacles: why a module cannot be quantized, by its name.
        progress: show a bar on stderr.
        finish: called with a folder that holds what `dst` will hold, before it does, to complete or to
            check it; if it raises, nothing is written. For a folder only.

    Returns:
        Bytes and error per layer, and the names of matrices that were left.

    Raises:
        FileNotFoundError: `src` is not there.
        ValueError: `src` is damaged, quantized already, the same as `dst`, or cannot be quantized
            (the message names file and tensor), or holds nothing to quantize; `finish` is given and
            `src` is a file.
    """
    source, target = Path(src), Path(dst)
    if finish is not None and not source.is_dir():
        raise ValueError(f"finish is for folders, and src is none, got {source}")
    selection = Selection(format, skip)
    readers = DenseReader(source, dtype=dtype).files
    indexed = _indexed(source, readers)
    names = {reader.path.name for reader in readers}
    check_target(source, target, {*names, INDEX_NAME} if indexed else names)
    report = Report()
    plans = [
        {k: rule.completed(method, options or {}) for k, rule in plan.items()}
        for plan in (_plan(reader, selection, obstacles or {}, report) for reader in readers)
    ]
    check_rules((rule for plan in plans for rule in plan.values()), calibrated=False)
    check_any(source, report, sum(map(len, plans)))
    selection.warn_unmatched(
        name.removesuffix(_WEIGHT) for reader in readers for name in reader.specs
    )
    planned = (
        math.prod(_shape(reader, layer))
        for reader, plan in zip(readers, plans, strict=True)
        for layer in plan
    )
    report.warn_unasked(sum(planned))
    weight_map: dict[str, str] = {}
    size = 0
    with contextlib.ExitStack() as stack:
        place = (
            stack.enter_context(staged(target, INDEX_NAME)) if source.is_dir() else target.parent
        )
        advance = stack.enter_context(bar(sum(map(len, plans)), "quantizing", progress))
        for reader, plan in zip(readers, plans, strict=True):
            path = place / (reader.path.name if source.is_dir() else target.name)
            sources = _sources(reader, plan, report, advance, on_layer)
            layers = {name: (_format(rule), _shape(reader, name)) for name, rule in plan.items()}
            marked = (source / CONFIG_NAME).is_file()
            write_checkpoint(path, sources, Header(layers, {}), reader.metadata, marked=marked)
            for specs in (s.specs for s in sources):
                weight_map.update(dict.fromkeys(specs, path.name))
                size += sum(torch.Size(s).numel() * d.itemsize for s, d in specs.values())
        if source.is_dir():
            copy_rest(source, place)
            if indexed:
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                text = json.dumps(index, indent=2, sort_keys=True)
                write_atomically(place / INDEX_NAME, lambda f: f.write(text.encode()))
        if finish is not None:
            finish(place)
    return report


class DenseWeights(Mapping[str, Tensor]):
    """The matrices of a checkpoint that `quantize_file` would quantize, each read when it is asked
    for; arguments and errors as there.
    """

    def __init__(
        self,
        src: str | os.PathLike[str],
        skip: Iterable[str] = FILE_SKIP,
        dtype: torch.dtype | None = None,
        obstacles: Mapping[str, str] | None = None,
    ) -> None:
        selection, report = Selection("int8", skip), Report()
        self._readers = {
            name: reader
            for reader in DenseReader(src, dtype=dtype).files
            for name in _plan(reader, selection, obstacles or {}, report)
        }
        check_any(Path(src), report, len(self._readers))

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name].tensor(name + _WEIGHT)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def ignored_files(source: Path) -> list[str]:
    """The .safetensors files of a folder that are not part of the checkpoint that is read."""
    if not source.is_dir():
        return []
    read = set(tensor_files(source))
    return [file.name for file in sorted(source.glob("*.safetensors")) if file not in read]


def check_any(source: Path, report: Report, planned: int) -> None:
    """Raises ValueError, with the reasons of the report, if nothing is left to quantize."""
    if not planned:
        why = "; ".join(
            f"{count} x {reason}" for reason, count in Counter(report.left.values()).most_common(8)
        )
        raise ValueError(f"{source}: nothing to quantize: {why or 'it holds no matrix'}")


def check_target(source: Path, target: Path, names: Iterable[str] = (FILE_NAME,)) -> None:
    """Raises ValueError if files of these names cannot be written to `target`: it is `source`, it is
    a file and `source` a folder, or it holds another checkpoint, which would be read instead.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"dst must not be src, got {target} for both")
    if not source.is_dir():
        if target.suffix != ".safetensors":
            raise ValueError(f"dst must end in .safetensors because src is a file, got {target}")
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"dst must be a folder because src is one, got the file {target}")
    for name in {FILE_NAME, INDEX_NAME} - set(names):
        if (target / name).exists():
            raise ValueError(f"dst must hold no other checkpoint, got {target / name}")


def _indexed(source: Path, readers: list[DenseFile]) -> bool:
    """Whether the files were found by the index of the folder."""
    whole = source / FILE_NAME
    return (source / INDEX_NAME).exists() and all(reader.path != whole for reader in readers)


def _shape(reader: DenseFile, layer: str) -> tuple[int, int]:
    n, k = reader.specs[layer + _WEIGHT][0]
    return n, k


def _format(rule: Rule) -> Format:
    assert rule.format is not None
    return rule.format


def _plan(
    reader: DenseFile, selection: Selection, obstacles: Mapping[str, str], report: Report
) -> dict[str, Rule]:
    """The layers of one file that are quantized; what is left is noted in the report."""
    plan = {}
    for name, (shape, dtype) in sorted(reader.specs.items()):
        if len(shape) < 2:
            continue
        layer = name.removesuffix(_WEIGHT)
        rule = selection.rule(layer)
        why, asked = None, False
        if selection.skipped(layer):
            why, asked = "skipped", True
        elif dtype not in WEIGHT_DTYPES:
            why = f"{str(dtype).removeprefix('torch.')}, not fp32, fp16 or bf16"
        elif layer == name or len(shape) != 2 or 0 in shape:
            why = f"not a matrix named *{_WEIGHT}"
        elif layer in obstacles:
            why = obstacles[layer]
        elif rule.format is None:
            why, asked = "not in the recipe", True
        if why is None:
            plan[layer] = rule
        else:
            report.leave(name, why, {name: math.prod(shape)}, asked)
    return plan


def _sources(
    reader: DenseFile,
    plan: Mapping[str, Rule],
    report: Report,
    advance: Callable[[], object],
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None,
) -> list[Source]:
    """What the new file holds, in the order of the old one."""

    def quantized(layer: str) -> QuantTensor:
        weight = reader.tensor(layer + _WEIGHT)
        try:
            rule = plan[layer]
            qt = Method(rule, None)(None, weight)
            if qt.format != rule.format:
                # The header with the formats is written first.
                raise ValueError(
                    f"method {rule.method!r} makes a format of its own for each weight, which a "
                    "file cannot follow: use quantize_model and save the model"
                )
        except (TypeError, ValueError) as e:
            raise type(e)(f"{reader.path}: {layer}: {e}") from e
        report.layers.append(measure(layer, weight, qt))
        if on_layer is not None:
            on_layer(layer, weight, qt)
        advance()
        return qt

    def copied(name: str) -> dict[str, Tensor]:
        return {name: reader.tensor(name)}

    sources = []
    for name, spec in reader.specs.items():
        layer = name.removesuffix(_WEIGHT)
        if layer != name and layer in plan:
            make = functools.partial(quantized, layer)
            sources.append(layer_source(layer, _format(plan[layer]), _shape(reader, layer), make))
        else:
            sources.append(Source({name: spec}, functools.partial(copied, name)))
    return sources


def copy_rest(source: Path, target: Path) -> None:
    """Copies configuration and tokenizer files."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.stem in _COPIED_NAMES
        if wanted and file.is_file() and file.name != INDEX_NAME:
            with file.open("rb") as old:
                write_atomically(target / file.name, functools.partial(shutil.copyfileobj, old))
