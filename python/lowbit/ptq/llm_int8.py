"""quantize_llm_int8: swaps the linears of a model for `lowbit.nn.LLMInt8Linear`, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn import LLMInt8Linear
from lowbit.nn.llm_int8 import THRESHOLD
from lowbit.nn.names import DEFAULT_SKIP, Rules, Selection
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq.calibration import InputStatistics, as_batches, collect, run
from lowbit.ptq.model import check_layers, check_notes, swap_or_leave
from lowbit.ptq.plan import plan_layers
from lowbit.ptq.progress import bar
from lowbit.ptq.report import LayerReport, Report, measure
from lowbit.ptq.swap import swapping


def quantize_llm_int8(
    model: nn.Module,
    format: Rules = "int8_row_a8",
    *,
    threshold: float = THRESHOLD,
    skip: Iterable[str] = DEFAULT_SKIP,
    progress: bool = True,
    calibration: Iterable[Any] | None = None,
    atomic: bool = True,
) -> Report:
    """Makes every linear of a model compute as LLM.int8() does (arXiv 2208.07339), in place.

    Args:
        model: any module. Its `nn.Linear` layers become `lowbit.nn.LLMInt8Linear`, each with a
            weight of its own.
        format: a Format with int8 activations or its name, or rules, as in `quantize_model`;
            without options of a method.
        threshold: features of x with |x| above it are not quantized.
        skip, progress: as in `quantize_model`.
        calibration: inputs of the model, as in `quantize_model`: the features that are above the
            threshold there are fixed. None finds them in every call, and so does a layer that no
            input has reached, or only zeros, with a note in the report and one warning.
        atomic: as in `quantize_model`.

    Returns:
        Bytes and error per layer, and the reason for every parameter of two or more dimensions that
        was left. The bytes count the columns of outlier features, which have no error.

    Warns:
        UserWarning: as `quantize_model`.

    Raises:
        TypeError, ValueError: an argument is wrong, or a weight cannot be quantized (the message
            starts with the layer's name); no input reaches any layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    report = Report()
    with stand_ins(model):
        plan = {}
        for names, (rule, weight_id) in plan_layers(model, Selection(format, skip), report).items():
            if rule.options:
                raise ValueError(f"{names[0]}: options must be empty, got {dict(rule.options)}")
            dense: Any = model.get_submodule(names[0])
            if isinstance(dense, nn.Linear):
                plan[names] = rule, weight_id
            else:
                size = {f"{names[0]}.weight": dense.weight.numel()}
                report.leave(names[0], "only linears have outlier features", size)
        check_layers(model, plan, {})
        batches = () if calibration is None else as_batches(calibration)
        statistics: dict[str, InputStatistics] = {}
        with (
            swapping(model, keep=atomic) as swap,
            bar(len(plan) + len(batches), "quantizing", progress) as advance,
        ):
            if batches:
                with collect(model, [names[0] for names in plan], hessian=False) as statistics:
                    run(model, batches, advance)
            for names, (rule, _) in plan.items():
                dense = model.get_submodule(names[0])
                assert rule.format is not None
                inputs = statistics.get(names[0])
                missing = None if inputs is None else inputs.missing
                try:
                    made = LLMInt8Linear.from_linear(
                        dense,
                        rule.format,
                        threshold=threshold,
                        absmax=None if inputs is None or missing else inputs.absmax,
                        method=rule.method,
                    )
                except (TypeError, ValueError) as e:
                    raise type(e)(f"{names[0]}: {e}") from e
                row = _row(names[0], dense.weight.detach(), made)
                note = missing and f"{missing}: its outlier features are found in every call"
                swap_or_leave(swap, names, made, dataclasses.replace(row, note=note), report)
                advance()
            check_notes(report, statistics, stacklevel=2)
    return report


@torch.no_grad()
def _row(name: str, weight: Tensor, made: LLMInt8Linear) -> LayerReport:
    qt = made.quantized.quant_tensor()
    if made.features is None or made.columns is None:
        return measure(name, weight, qt)
    row = measure(name, weight.index_fill(1, made.features, 0), qt)
    return dataclasses.replace(row, nbytes=row.nbytes + made.features.nbytes + made.columns.nbytes)
