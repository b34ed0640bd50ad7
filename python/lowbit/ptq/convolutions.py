"""Rules that do not fit a convolution, and what is done instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowbit.methods.registry import calibrates, keywords
from lowbit.nn.conv import CONVOLUTIONS
from lowbit.nn.names import Rule
from lowbit.ptq.report import Report
from lowbit.ptq.scaling import SCALINGS


def fitting(module: Any, rule: Rule, calibrated: bool) -> tuple[Rule, str | None]:
    """The rule that a layer is quantized by, without what a convolution cannot do, and a note of that."""
    conv, format = module, rule.format
    if not isinstance(module, CONVOLUTIONS) or format is None:
        return rule, None
    notes = []
    if rule.method in SCALINGS:
        notes.append(f"scales of a convolution are not folded: quantized without {rule.method!r}")
        rule = replace(rule, method=None, options={})
    if conv.groups > 1:
        if format.activation is not None:
            notes.append("with groups of channels: activations stay as they are")
            rule = replace(rule, format=format.with_activation(None))
        if calibrated and rule.method is not None and calibrates(rule.method):
            notes.append("with groups of channels: quantized without calibration")
        if rule.method is not None and "hessian" in keywords(rule.method):
            rule = Rule(rule.format)
    return rule, "; ".join(notes) or None


def add_notes(report: Report, notes: Mapping[str, str | None]) -> None:
    """Adds notes to the rows of layers, by their first names."""
    for i, row in enumerate(report.layers):
        if note := notes.get(row.name):
            report.layers[i] = replace(row, note=f"{row.note}; {note}" if row.note else note)
