"""What `lowbit quantize` does: a safetensors checkpoint is quantized tensor by tensor. If that does not
give the model of a folder of transformers, or it is to be calibrated, the model is loaded; and what
is written is compared with the model before the command is done.

`quantize(options)` is all that the command line calls.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import parse
from lowbit.io.foreign import CONFIG_NAME, read_json, refuse_quantized
from lowbit.io.readers.gguf_reader import GGUFReader
from lowbit.io.readers.native import NativeReader
from lowbit.io.readers.registry import open_checkpoint
from lowbit.methods.registry import calibrates, check_options, keywords
from lowbit.nn.names import Rule, Rules, Selection
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq import (
    Allocation,
    Recipe,
    Report,
    allocate,
    collect_importance,
    quantize_model,
    save_importance,
)
from lowbit.ptq.allocate import OBJECTIVES
from lowbit.ptq.file import FILE_SKIP, DenseWeights, check_any, ignored_files, quantize_file
from lowbit.ptq.scaling import SCALINGS, check_scaling
from lowbit.weights.quantized import QuantTensor

QUANTIZED = ("refuse", "keep", "requantize")
OnLayer = Callable[[str, Tensor, QuantTensor], object]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What `lowbit quantize` was asked for.

    Attributes:
        source: a .safetensors file, or a folder with some; a GGUF file; with `calibrate` a GGUF file or a
            folder of transformers.
        target: the file or folder to write.
        formats: one, or with `budget` the candidates.
        recipe: a file of `Recipe` instead of formats.
        budget: average stored bits per weight that `allocate` must meet.
        objective: of `allocate`, with `calibrate`.
        method, options: as in `lowbit.quantize_model`.
        skip: patterns of modules to leave dense, besides heads (and, without `calibrate`,
            embeddings and norms).
        dtype: of what stays dense and, before they are quantized, of the weights; None takes that
            of config.json, or what each tensor has.
        calibrate: text or tokens, `lowbit.integrations.pretrained.calibration_tokens`.
        length, samples, per_line, seed: as there.
        imatrix: the importance of input features, a file, as in `lowbit.quantize_model`; with `budget`
            also as in `lowbit.ptq.allocate`.
        save_imatrix: the file to write it to, as `calibrate` finds it in the dense model.
        report: a folder for tables and plots.
        quantized: what becomes of a folder or GGUF file that is quantized already: "refuse", "keep" (packed
            as it is, without a format) or "requantize" (decoded, and quantized like a dense one).
    """

    source: Path
    target: Path
    formats: tuple[str, ...] = ()
    recipe: Path | None = None
    budget: float | None = None
    objective: str = "kl"
    method: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    skip: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    calibrate: Path | None = None
    length: int = 512
    samples: int = 128
    per_line: bool = False
    seed: int = 0
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    report: Path | None = None
    quantized: str = "refuse"
    max_shard_size: str | None = None

    def __post_init__(self) -> None:
        if self.quantized not in QUANTIZED:
            raise ValueError(f"--quantized must be one of {QUANTIZED}, got {self.quantized!r}")
        if self.quantized == "keep":
            self._check_kept()
            return
        for name in self.formats:
            parse(name)
        if (self.recipe is None) == (not self.formats):
            raise ValueError("give --format or --recipe, one of the two")
        if self.budget is not None and self.recipe is not None:
            raise ValueError("--budget chooses between formats, and a recipe has chosen already")
        if len(self.formats) > 1 and self.budget is None:
            raise ValueError("several formats are candidates for --budget, which is not given")
        if len(self.formats) == 1 and self.budget is not None:
            raise ValueError("--budget chooses between formats: give --format several times")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective must be one of {OBJECTIVES}, got {self.objective!r}")
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("length", "samples", "per_line", "seed", "objective"):
            if self.calibrate is None and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for --calibrate, which is not given"
                )
        if self.budget is None and self.objective != defaults["objective"]:
            raise ValueError("--objective is for --budget, which is not given")
        if self.method in SCALINGS:
            check_scaling(Rule(None, self.method, dict(self.options)))
            if self.calibrate is None or self.budget is not None:
                how = "needs --calibrate FILE" if self.calibrate is None else "takes no --budget"
                raise ValueError(f"method {self.method!r} {how}")
        elif self.method is not None:
            check_options(self.method, dict(self.options))
            if "hessian" in keywords(self.method) and self.calibrate is None:
                raise ValueError(f"method {self.method!r} needs --calibrate FILE")
        elif self.options:
            raise ValueError("--option is for a method: give --method")
        if self.imatrix is not None and self.calibrate is not None and self.budget is None:
            raise ValueError(
                "--imatrix is for methods that learn from it: give it without --calibrate, or with --budget, too, "
                "whose errors --calibrate then measures"
            )
        if self.imatrix is not None and self.method and "hessian" in keywords(self.method):
            raise ValueError(
                f"method {self.method!r} learns from --calibrate: give it without --imatrix"
            )
        if self.save_imatrix is not None and self.calibrate is None:
            raise ValueError("--save-imatrix is for --calibrate, which is not given")
        learns = self.budget is not None or self.learns
        if self.calibrate is not None and not learns and self.save_imatrix is None:
            raise ValueError(
                f"--calibrate is for --budget, or a method that learns, not {self.method}"
            )

    @property
    def learns(self) -> bool:
        """Whether quantizing the model may take calibration."""
        return self.recipe is not None or self.method in SCALINGS or calibrates(self.method)

    def _check_kept(self) -> None:
        for name in (
            "formats",
            "recipe",
            "budget",
            "method",
            "options",
            "skip",
            "calibrate",
            "imatrix",
            "save_imatrix",
            "report",
        ):
            if getattr(self, name):
                option = "format" if name == "formats" else name.rstrip("s").replace("_", "-")
                raise ValueError(f"--quantized keep quantizes nothing: give it without --{option}")


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Runs the command.

    Returns:
        The report as text, and as plain data for JSON.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: a file or a package is missing, or
            cannot be used.
    """
    if options.quantized == "keep":
        return _keep(options)
    histograms = None
    if options.report is not None:
        # Before the work, as it may not be installed.
        from lowbit.ptq import plots

        histograms = plots.WeightHistograms()
    rules: Rules | None = None
    if options.recipe is not None:
        rules = Recipe.load(options.recipe)
    elif options.budget is None:
        rules = options.formats[0]
    report, allocation = _quantize(options, rules, histograms)
    if options.report is not None:
        plots.write_report(options.report, report, allocation, histograms)
    written, ignored = _written(options.target), ignored_files(options.source)
    data = {**report.to_dict(), "written": written, "ignored": ignored}
    text = str(report)
    if allocation is not None:
        data["allocation"] = allocation.to_dict()
        text = f"{allocation}\n\n{text}"
    lines = [f"not read: {name} (transformers loads another file)" for name in ignored]
    lines.append(_last_line(options, written))
    return {"text": "\n".join([text, *lines]), "data": data}


def _keep(options: QuantizeOptions) -> dict[str, Any]:
    """Writes what another program quantized packed as it is."""
    pretrained = _pretrained()
    if not _is_gguf(options.source) and not _is_transformers_folder(options.source):
        raise ValueError(
            f"{options.source}: --quantized is for folders of transformers and GGUF files"
        )
    from lowbit.integrations.load import load_as_stored

    with _folder(options.source) as folder:
        pretrained.check_folders(folder, options.target, options.max_shard_size)
        model, found = load_as_stored(options.source, options.dtype)
        pretrained.save_folder(
            model, folder, options.target, _finish(options), max_shard_size=options.max_shard_size
        )
    written = _written(options.target)
    data = {"packed": found.packed, "dense": found.dense, "unused": found.unused}
    return {
        "text": f"{found}\n{_last_line(options, written)}",
        "data": {**data, "written": written},
    }


def _last_line(options: QuantizeOptions, written: dict[str, Any]) -> str:
    return (
        f"written: {options.target}, {written['bytes']:,} bytes, {100 * written['packed']:.1f} % of "
        f"{written['weights']:,} weights packed"
    )


def _pretrained() -> Any:
    try:
        from lowbit.integrations import pretrained
    except ModuleNotFoundError as e:
        raise ImportError(
            f"{e.name} is not installed; a folder of transformers needs: pip install "
            "'lowbit[models]'"
        ) from None
    return pretrained


def _finish(options: QuantizeOptions) -> Callable[[Path], None]:
    """Completes a folder that is not in its place yet, and checks that it loads."""
    pretrained = _pretrained()

    def finish(folder: Path) -> None:
        pretrained.name_lowbit(folder)
        if options.dtype is not None:
            pretrained.set_dtype(folder, options.dtype)
        try:
            pretrained.check_folder(folder)
        except ValueError as e:
            why = str(e).replace(str(folder), str(options.target))
            raise ValueError(f"nothing is written, as it would not load: {why}") from e

    return finish


def _is_gguf(source: Path) -> bool:
    return source.is_file() and GGUFReader.detect(source)


@contextlib.contextmanager
def _folder(source: Path) -> Iterator[Path]:
    """The folder with the configuration and the tokenizer of a source."""
    if not _is_gguf(source):
        yield source
        return
    from lowbit.integrations.gguf_folder import folder_of

    with folder_of(source) as folder:
        yield folder


def _written(target: Path) -> dict[str, Any]:
    """Bytes, weights, and the share of the weights that is packed."""
    rows = NativeReader(target).describe()
    weights = sum(math.prod(row.shape) for row in rows)
    packed = sum(math.prod(row.shape) for row in rows if row.quantized)
    size = sum(row.nbytes for row in rows)
    return {"bytes": size, "weights": weights, "packed": packed / max(1, weights)}


def _quantize(
    options: QuantizeOptions, rules: Rules | None, on_layer: OnLayer | None
) -> tuple[Report, Allocation | None]:
    if _is_gguf(options.source):
        _check_gguf(options)
        return _quantize_model(options, rules, on_layer)
    if options.imatrix is not None and not _is_transformers_folder(options.source):
        raise ValueError(
            f"--imatrix is for folders of transformers and GGUF files, got {options.source}"
        )
    if options.calibrate is None and not _is_transformers_folder(options.source):
        if options.max_shard_size is not None:
            raise ValueError(
                f"--max-shard-size is for folders of transformers, got {options.source}"
            )
        return _quantize_file(options, rules, on_layer, options.dtype, None)
    pretrained = _pretrained()
    from lowbit.integrations.configuration import read_config

    again = options.quantized == "requantize"
    if not again:
        refuse_quantized(options.source)
    obstacles = None
    # Tensor by tensor a folder keeps the files that it has.
    runs = options.calibrate is not None or options.imatrix is not None
    if not runs and not again and options.max_shard_size is None:
        dtype = options.dtype or read_config(options.source).dtype
        selection = Selection(rules or options.formats[0], _skip(options))
        obstacles = pretrained.obstacles(options.source, selection, dtype)
    if obstacles is not None:
        return _quantize_file(options, rules, on_layer, dtype, obstacles, _finish(options))
    return _quantize_model(options, rules, on_layer)


def _check_gguf(options: QuantizeOptions) -> None:
    """Raises ValueError unless a GGUF file is quantized, or dense, as the options say."""
    _pretrained()
    from lowbit.integrations.gguf_folder import quantized_types

    types, again = quantized_types(options.source), options.quantized == "requantize"
    if types and not again:
        raise ValueError(
            f"{options.source}: is quantized already ({', '.join(types)}): let --quantized keep or requantize it, "
            "or give the dense model that it was made from"
        )
    if again and not types:
        raise ValueError(
            f"{options.source}: must be quantized for --quantized requantize, it is dense"
        )


def _is_transformers_folder(source: Path) -> bool:
    config = source / CONFIG_NAME
    return config.is_file() and "model_type" in read_json(config)


def _skip(options: QuantizeOptions) -> tuple[str, ...]:
    """Without calibration a folder gives what its file would give."""
    return (*(FILE_SKIP if options.calibrate is None else ("lm_head",)), *options.skip)


def _quantize_file(
    options: QuantizeOptions,
    rules: Rules | None,
    on_layer: OnLayer | None,
    dtype: torch.dtype | None,
    obstacles: dict[str, str] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> tuple[Report, Allocation | None]:
    skip = _skip(options)
    how: dict[str, Any] = {"method": options.method, "options": dict(options.options)}
    allocation = None
    if rules is None:
        weights = DenseWeights(options.source, skip, dtype, obstacles)
        allocation = allocate(weights, options.formats, options.budget, skip=(), **how)
        rules = allocation.recipe
    report = quantize_file(
        options.source,
        options.target,
        rules,
        skip=skip,
        dtype=dtype,
        obstacles=obstacles,
        on_layer=on_layer,
        finish=finish,
        **how,
    )
    return report, allocation


def _quantize_model(
    options: QuantizeOptions,
    rules: Rules | None,
    on_layer: OnLayer | None,
) -> tuple[Report, Allocation | None]:
    with _folder(options.source) as folder:
        return _quantize_model_of(folder, options, rules, on_layer)


def _quantize_model_of(
    folder: Path, options: QuantizeOptions, rules: Rules | None, on_layer: OnLayer | None
) -> tuple[Report, Allocation | None]:
    """As `_quantize_model`, with the folder that has the configuration and the tokenizer of the source."""
    from lowbit.integrations import pretrained
    from lowbit.integrations.load import cast, keep_stored, load_decoded

    pretrained.check_folders(folder, options.target, options.max_shard_size)
    batches = None
    if options.calibrate is not None:
        batches = pretrained.calibration_tokens(
            options.calibrate,
            folder,
            length=options.length,
            samples=options.samples,
            per_line=options.per_line,
            seed=options.seed,
        )
    rest: list[str] = []
    if folder != options.source:
        # The values of the file's blocks are no bf16.
        model = load_decoded(options.source, options.dtype or torch.float32)
    elif options.quantized == "requantize":
        if open_checkpoint(options.source, mmap=False).name == "dense":
            raise ValueError(
                f"{options.source}: must be a folder that is quantized, got one that is not"
            )
        model = load_decoded(options.source, options.dtype)
    else:
        model, rest = pretrained.load_dense_and_rest(options.source, options.dtype)
    skip = _skip(options)
    how: dict[str, Any] = {"method": options.method, "options": dict(options.options)}
    allocation = None
    with stand_ins(model):
        if options.save_imatrix is not None:
            assert batches is not None
            statistics = collect_importance(model, batches)
            name, size = str(options.calibrate), options.length
            save_importance(options.save_imatrix, model, statistics, dataset=name, chunk_size=size)
        if rules is None:
            allocation = allocate(
                model,
                options.formats,
                options.budget,
                skip=skip,
                calibration=batches,
                objective=options.objective,
                importance=options.imatrix,
                **how,
            )
            rules = allocation.recipe
        inputs = batches if options.learns and options.imatrix is None else None
        importance = options.imatrix
        if allocation is not None and importance is not None and not _learns_importance(allocation):
            importance = None
        # An error ends the command, and the model with it.
        report = quantize_model(
            model,
            rules,
            skip=skip,
            calibration=inputs,
            importance=importance,
            on_layer=on_layer,
            atomic=False,
            **how,
        )
    if options.quantized == "requantize":
        for name, format in keep_stored(model, options.source).items():
            report.leave(name, f"stays packed as stored, {format}")
    for name in rest:
        report.leave(name, f"not part of a {type(model).__name__}, and not written")
    check_any(options.source, report, len(report.layers))
    if folder != options.source and options.dtype is None:
        cast(model, torch.bfloat16)
    shards = options.max_shard_size
    pretrained.save_folder(model, folder, options.target, _finish(options), max_shard_size=shards)
    return report, allocation


def _learns_importance(allocation: Allocation) -> bool:
    """Whether something that was chosen has a method that takes importance."""
    methods = {choice.option.rule.method for choice in allocation.choices}
    return any(method is not None and "weights" in keywords(method) for method in methods)


def parse_options(given: tuple[str, ...] | list[str]) -> tuple[tuple[str, Any], ...]:
    """Keywords of a method, each from KEY=VALUE with a value in JSON.

    Raises:
        ValueError: a text is not of this form, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals or key in found:
            raise ValueError(f"--option must be KEY=VALUE, each key once, got {text!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                f"--option {key}: value must be a number, true or false, or a string in "
                f"double quotes, got {value!r}"
            ) from None
    return tuple(found.items())
