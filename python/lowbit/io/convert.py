"""quantize_file: a dense safetensors checkpoint in, a quantized one out, one tensor in memory at a
time.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.files import write_atomically
from lowbit.formats import Format
from lowbit.io.checkpoint import Header, layer_source, write_checkpoint
from lowbit.io.container import INDEX_NAME, Reader, Source, tensor_files
from lowbit.quantize import Report, Rule, Selection
from lowbit.quantize.model import Method, check_rules
from lowbit.quantize.names import Rules
from lowbit.quantize.progress import bar
from lowbit.quantize.report import measure
from lowbit.tensor import QuantTensor

# A file does not say which module a matrix belongs to; these are the names of heads, embeddings and
# norms in the models of transformers.
DEFAULT_SKIP = (
    "lm_head",
    r"\w*embed\w*",
    "wte|wpe|shared|relative_attention_bias",
    r"\w*norm\w*|ln_\w+",
)
_WEIGHT = ".weight"
# fp8 is left out: such a weight has a scale of its own beside it.
_DENSE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Besides tensors, what a folder needs to be loaded.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE")


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: Rules,
    *,
    skip: Iterable[str] = DEFAULT_SKIP,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None = None,
) -> Report:
    """Quantizes a checkpoint on disk without building its model.

    Quantized are two-dimensional fp32, fp16, bf16 or fp64 tensors named "*.weight", but for those
    of skipped modules; everything else is copied. A file does not tell an nn.Linear from another
    module with a matrix (an embedding under an unusual name, the transposed Conv1D of GPT-2): name
    those in `skip`, or `lowbit.load` will refuse the file.

    Args:
        src: a .safetensors file, or a folder with one or with model.safetensors.index.json.
        dst: for a file, a file; for a folder, another folder (made if needed), which also gets the
            configuration and tokenizer files. Each file is complete or not there; the index comes
            last.
        format: one format or a recipe, as in `lowbit.quantize_model`; patterns are matched against
            the name without ".weight".
        skip: patterns of modules to leave; by default heads, embeddings and norms.
        method, options, on_layer: as in `lowbit.quantize_model`; no model runs, so methods that
            need calibration are refused, and so is "nuuq", which makes formats of its own.
        progress: show a bar on stderr.

    Returns:
        Bytes and error per layer, and the names of matrices that were left.

    Raises:
        FileNotFoundError: `src` is not there.
        ValueError: `src` is damaged, quantized already, the same as `dst`, or cannot be quantized;
            the message names file and tensor.
    """
    source, target = Path(src), Path(dst)
    selection = Selection(format, skip)
    readers = _dense_readers(source)
    paths = _target_paths(source, target, readers)
    report = Report()
    plans = [
        {k: rule.completed(method, options or {}) for k, rule in plan.items()}
        for plan in (_plan(reader, selection, report) for reader in readers)
    ]
    check_rules((rule for plan in plans for rule in plan.values()), calibrated=False)
    weight_map: dict[str, str] = {}
    size = 0
    with bar(sum(map(len, plans)), "quantizing", progress) as advance:
        for reader, plan, path in zip(readers, plans, paths, strict=True):
            sources = _sources(reader, plan, report, advance, on_layer)
            layers = {name: (_format(rule), _shape(reader, name)) for name, rule in plan.items()}
            write_checkpoint(path, sources, Header(layers, {}), reader.metadata)
            for specs in (s.specs for s in sources):
                weight_map.update(dict.fromkeys(specs, path.name))
                size += sum(torch.Size(s).numel() * d.itemsize for s, d in specs.values())
    if source.is_dir():
        copy_rest(source, target)
        if (source / INDEX_NAME).exists():
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            write_atomically(target / INDEX_NAME, lambda f: f.write(text.encode()))
    return report


class DenseWeights(Mapping[str, Tensor]):
    """The matrices of a checkpoint that `quantize_file` would quantize, each read when it is asked
    for; arguments and errors as there.
    """

    def __init__(self, src: str | os.PathLike[str], skip: Iterable[str] = DEFAULT_SKIP) -> None:
        selection, report = Selection("int8", skip), Report()
        self._readers = {
            name: reader
            for reader in _dense_readers(Path(src))
            for name in _plan(reader, selection, report)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name].tensor(name + _WEIGHT)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _dense_readers(source: Path) -> list[Reader]:
    readers = [Reader(file) for file in tensor_files(source)]
    for reader in readers:
        if "lowbit" in reader.metadata:
            raise ValueError(f"{reader.path}: is a lowbit checkpoint already")
    return readers


def check_target(source: Path, target: Path) -> None:
    """Raises ValueError if `target` is `source`, or is a file and `source` is a folder."""
    if source.resolve() == target.resolve():
        raise ValueError(f"dst must not be src, got {target} for both")
    if source.is_dir() and target.exists() and not target.is_dir():
        raise ValueError(f"dst must be a folder because src is one, got the file {target}")


def _target_paths(source: Path, target: Path, readers: list[Reader]) -> list[Path]:
    check_target(source, target)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return [target / reader.path.name for reader in readers]
    if target.suffix != ".safetensors":
        raise ValueError(f"dst must end in .safetensors because src is a file, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return [target]


def _shape(reader: Reader, layer: str) -> tuple[int, int]:
    n, k = reader.specs[layer + _WEIGHT][0]
    return n, k


def _format(rule: Rule) -> Format:
    assert rule.format is not None
    return rule.format


def _plan(reader: Reader, selection: Selection, report: Report) -> dict[str, Rule]:
    """The layers of one file that are quantized; what is left is noted in the report."""
    plan = {}
    for name, (shape, dtype) in sorted(reader.specs.items()):
        if len(shape) < 2 or dtype not in _DENSE_DTYPES:
            continue
        layer = name.removesuffix(_WEIGHT)
        rule = selection.rule(layer)
        if layer == name or len(shape) != 2 or 0 in shape:
            report.left[name] = f"not a matrix named *{_WEIGHT}"
        elif selection.skipped(layer):
            report.left[name] = "skipped"
        elif rule.format is None:
            report.left[name] = "not in the recipe"
        else:
            plan[layer] = rule
    return plan


def _sources(
    reader: Reader,
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
