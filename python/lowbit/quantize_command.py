"""What `lowbit quantize` does: a safetensors checkpoint is quantized tensor by tensor, or, to be
calibrated, the model of a folder of transformers is run.

`quantize(options)` is all that the command line calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.formats import parse
from lowbit.io.convert import DEFAULT_SKIP, DenseWeights, quantize_file
from lowbit.quantize import Allocation, Recipe, Report, allocate, quantize_model
from lowbit.quantize.allocate import OBJECTIVES
from lowbit.quantize.methods import calibrates, check_options, keywords
from lowbit.quantize.names import Rules
from lowbit.tensor import QuantTensor

OnLayer = Callable[[str, Tensor, QuantTensor], object]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What `lowbit quantize` was asked for.

    Attributes:
        source: a .safetensors file, or a folder with some; with `calibrate` a folder of
            transformers.
        target: the file or folder to write.
        formats: one, or with `budget` the candidates.
        recipe: a file of `Recipe` instead of formats.
        budget: average stored bits per weight that `allocate` must meet.
        objective: of `allocate`, with `calibrate`.
        method, options: as in `lowbit.quantize_model`.
        skip: patterns of modules to leave dense, besides heads (and, in a file, embeddings and
            norms).
        calibrate: text or tokens, `lowbit.integrations.pretrained.calibration_tokens`.
        length, samples, per_line, seed: as there.
        report: a folder for tables and plots.
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
    calibrate: Path | None = None
    length: int = 512
    samples: int = 128
    per_line: bool = False
    seed: int = 0
    report: Path | None = None

    def __post_init__(self) -> None:
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
        if self.method is not None:
            check_options(self.method, dict(self.options))
            if "hessian" in keywords(self.method) and self.calibrate is None:
                raise ValueError(f"method {self.method!r} needs --calibrate FILE")
        elif self.options:
            raise ValueError("--option is for a method: give --method")
        learns = self.budget is not None or self.recipe is not None or calibrates(self.method)
        if self.calibrate is not None and not learns:
            raise ValueError(
                f"--calibrate is for --budget, or a method that learns, not {self.method}"
            )


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Runs the command.

    Returns:
        The report as text, and as plain data for JSON.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: a file or a package is missing, or
            cannot be used.
    """
    histograms = None
    if options.report is not None:
        # Before the work, as it may not be installed.
        from lowbit.quantize import plots

        histograms = plots.WeightHistograms()
    rules: Rules | None = None
    if options.recipe is not None:
        rules = Recipe.load(options.recipe)
    elif options.budget is None:
        rules = options.formats[0]
    quantized = _quantize_file if options.calibrate is None else _quantize_model
    report, allocation = quantized(options, rules, histograms)
    if options.report is not None:
        plots.write_report(options.report, report, allocation, histograms)
    data = report.to_dict()
    text = str(report)
    if allocation is not None:
        data["allocation"] = allocation.to_dict()
        text = f"{allocation}\n\n{text}"
    return {"text": text, "data": data}


def _quantize_file(
    options: QuantizeOptions, rules: Rules | None, on_layer: OnLayer | None
) -> tuple[Report, Allocation | None]:
    skip = (*DEFAULT_SKIP, *options.skip)
    how: dict[str, Any] = {"method": options.method, "options": dict(options.options)}
    allocation = None
    if rules is None:
        weights = DenseWeights(options.source, skip)
        allocation = allocate(weights, options.formats, options.budget, skip=(), **how)
        rules = allocation.recipe
    report = quantize_file(
        options.source, options.target, rules, skip=skip, on_layer=on_layer, **how
    )
    return report, allocation


def _quantize_model(
    options: QuantizeOptions, rules: Rules | None, on_layer: OnLayer | None
) -> tuple[Report, Allocation | None]:
    try:
        from lowbit.integrations import pretrained
    except ModuleNotFoundError as e:
        raise ImportError(
            f"{e.name} is not installed; --calibrate needs: pip install 'lowbit[models]'"
        ) from None
    assert options.calibrate is not None
    pretrained.check_folders(options.source, options.target)
    batches = pretrained.calibration_tokens(
        options.calibrate,
        options.source,
        length=options.length,
        samples=options.samples,
        per_line=options.per_line,
        seed=options.seed,
    )
    model = pretrained.load_dense(options.source)
    skip = ("lm_head", *options.skip)
    how: dict[str, Any] = {"method": options.method, "options": dict(options.options)}
    allocation = None
    if rules is None:
        allocation = allocate(
            model,
            options.formats,
            options.budget,
            skip=skip,
            calibration=batches,
            objective=options.objective,
            **how,
        )
        rules = allocation.recipe
    learns = options.recipe is not None or calibrates(options.method)
    inputs = batches if learns else None
    # An error ends the command, and the model with it.
    how["atomic"] = False
    report = quantize_model(model, rules, skip=skip, calibration=inputs, on_layer=on_layer, **how)
    pretrained.save_folder(model, options.source, options.target)
    return report, allocation


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
