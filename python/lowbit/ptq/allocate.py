"""allocate: which format each weight of a model gets, so that the error is least at a given size.

As in HAWQ-V2 (Dong et al., arXiv 1911.03852) the error of a model is the sum over its layers of a
sensitivity times the squared error of the weight, and as in HAWQ-V3 (Yao et al., arXiv 2011.10680)
the choice is the integer program's optimum. Interpretation: the sensitivity is the Fisher information
of the model's outputs (`fisher.py`), and the error of every candidate is measured, not modelled.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.methods.errors import errors
from lowbit.methods.registry import calibrates, keywords
from lowbit.nn.conv import matrix_of
from lowbit.nn.names import DEFAULT_SKIP, Rule, Selection, as_rule, listed
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq.allocation import Allocation, Choice, Option, as_bytes, check_capacity, choose
from lowbit.ptq.calibration import InputStatistics, as_batches, calibrate
from lowbit.ptq.divergence import divergences
from lowbit.ptq.fisher import output_fisher
from lowbit.ptq.given import check_one_of, with_method
from lowbit.ptq.importance import as_importance
from lowbit.ptq.model import Inputs, check_rules, chunks, informed
from lowbit.ptq.plan import plan_layers
from lowbit.ptq.progress import bar
from lowbit.ptq.report import Report
from lowbit.weights.quantized import QuantTensor, stored_bytes

OBJECTIVES = ("kl", "output", "measured")


def allocate(
    weights: nn.Module | Mapping[str, Tensor],
    candidates: Iterable[Format | str | Rule],
    budget: float | None = None,
    *,
    budget_bytes: int | None = None,
    skip: Iterable[str] = DEFAULT_SKIP,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    objective: str = "kl",
    sensitivities: Mapping[str, float | Tensor] | None = None,
    importance: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Allocation:
    """Chooses a format for every weight: the least sum of errors that fits the budget.

    With `calibration` the error of a weight is the KL divergence, in nats, that its quantization
    makes between the outputs of the dense and the quantized model, estimated by `output_fisher`.
    With objective "output" it is the mean squared error of the layer's own outputs, tr((W - W^) H
    (W - W^)^T) with H the mean x x^T of its inputs: that does not tell layers whose outputs matter
    from others, and in a deep model can be worse than one format for all weights. With objective
    "measured" it is that KL divergence as it is found: the model runs with every candidate of every
    weight by itself, which takes (layers * candidates + 1) runs for each input of `calibration`.
    Without calibration it is the squared error of the weight, H = 1. Errors of a layer that calibration says
    nothing of, as an expert that a router never picks, count 0, with a warning. Every candidate is made and measured;
    with a method that looks at one weight at a time it is what `quantize_model` will make.

    Args:
        weights: a model, whose `nn.Linear` layers are meant, or names with matrices (N, K). A
            mapping may read each matrix when it is asked for; none is kept.
        candidates: formats, or `Rule`s with a method of their own.
        budget: average stored bits of a weight, scales and tables included.
        budget_bytes: the same as a total in bytes; one of the two must be given.
        skip: patterns of modules to leave, as in `quantize_model`; they are not in the budget.
        method, options: as in `quantize_model`, for candidates without a method.
        calibration: inputs of the model, as in `quantize_model`.
        objective: of calibration, "kl", "measured" or "output". The first runs the model backward,
            too; the first two take its output, or the `logits` of its output, for logits. For
            "measured" all candidates are in memory at once, packed; some inputs are enough.
        sensitivities: for every name, instead of calibration: a factor for the squared error (the
            mean trace of the loss's Hessian in HAWQ-V2), the diagonal of H, (K,), or H, (K, K).
            Methods that need calibration get H, or its diagonal.
        importance: what each input feature of a layer counts, as in `quantize_model`: an imatrix
            file, or (K,) by the name of a linear. Methods that take `weights` get it; and without
            calibration H is its diagonal.
        progress: show a bar on stderr.

    Returns:
        The choices and, in `left`, the reason for every parameter of two or more dimensions that is
        not among them. `quantize_model(model, allocation.recipe)`, with the same `skip`, `importance` and,
        if the method needs it, `calibration`, makes them.

    Warns:
        UserWarning: as `quantize_model`.

    Raises:
        TypeError, ValueError: an argument is wrong; the budget is below what the smallest
            candidates need; a weight cannot be quantized (the message starts with its name);
            `importance` is of another model, has no entry of a layer, one of another length, or one
            that holds NaN, inf or zeros alone, or a method takes none.
    """
    rules = [as_rule(c).completed(method, options or {}) for c in candidates]
    if not rules or any(rule.format is None for rule in rules):
        raise ValueError("candidates must hold at least one format, and no None")
    if calibration is not None and sensitivities is not None:
        raise ValueError("give calibration or sensitivities, not both")
    if importance is not None:
        check_one_of(importance=importance, sensitivities=sensitivities)
        if not isinstance(weights, nn.Module):
            raise ValueError("importance needs a model: give sensitivities for a mapping")
        rules = [with_method(rule) for rule in rules]
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}, got {objective!r}")
    check_rules(rules, calibration is not None or sensitivities is not None)
    if importance is not None:
        known = {rule.method or "": keywords(rule.method or "") for rule in rules}
        for method_name, takes in known.items():
            if "hessian" in takes or not any("weights" in t for t in known.values()):
                raise ValueError(
                    f"method {method_name!r} takes no importance: use 'search' or 'kmeans'"
                )
    with stand_ins(weights) if isinstance(weights, nn.Module) else contextlib.nullcontext():
        layers, left = _layers(weights, rules[0], skip)
        if not layers:
            raise ValueError("weights must hold at least one linear that is not skipped")
        numel = sum(math.prod(layer.shape) for layer in layers)
        capacity = as_bytes(budget, budget_bytes, numel)
        features = None
        if importance is not None:
            assert isinstance(weights, nn.Module)
            features = _features(layers, weights, as_importance(importance, weights) or {})
        formats = [rule.format for rule in rules if rule.format is not None]
        # Before hours of measuring.
        check_capacity(
            [[stored_bytes(f, *la.shape) for f in formats] for la in layers], capacity, numel
        )
        if calibration is not None:
            if not isinstance(weights, nn.Module):
                raise ValueError("calibration needs a model: give sensitivities for a mapping")
            batches = as_batches(calibration)
            measured = _calibrated(layers, rules, weights, batches, objective, features, progress)
        else:
            measured = _given(layers, rules, weights, features or sensitivities, progress)
        found = [
            Choice(layer.names, layer.shape, tuple(options), 0)
            for layer, options in zip(layers, measured, strict=True)
        ]
        return choose(found, left, capacity)


@dataclass(frozen=True)
class _Layer:
    """A weight: the modules that share it, the first of which it is read from."""

    names: tuple[str, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Sensitivity:
    """What one use of a weight says of its errors: H as a factor, a diagonal, or all of it, and the
    diagonal of G. What `Method` takes as inputs, where it was given.
    """

    value: float | Tensor
    rows: Tensor | None = None  # (N,)

    @property
    def relative_hessian(self) -> Tensor:
        assert isinstance(self.value, Tensor)
        if self.value.dim() != 2:
            got = tuple(self.value.shape)
            raise ValueError(f"the method needs a sensitivity of shape (K, K), got {got}")
        return self.value

    @property
    def relative_diagonal(self) -> Tensor:
        assert isinstance(self.value, Tensor)
        return self.value if self.value.dim() == 1 else self.value.diagonal()

    def error(self, weight: Tensor, qt: QuantTensor) -> float:
        """tr(G (W - W^) H (W - W^)^T), fp64."""
        h = self.value
        if isinstance(h, Tensor):
            h = h.to(weight.device, torch.float64)
        begin, total = 0, 0.0
        for _, e in errors(weight, qt):
            product = e @ h if isinstance(h, Tensor) and h.dim() == 2 else e * h
            per_row = (product * e).sum(1)
            if self.rows is not None:
                per_row = per_row * self.rows[begin : begin + len(e)].to(e.device)
            begin += len(e)
            total += float(per_row.sum())
        return total


def _layers(
    weights: nn.Module | Mapping[str, Tensor], rule: Rule, skip: Iterable[str]
) -> tuple[list[_Layer], dict[str, str]]:
    """The weights to quantize, and the modules that are left."""
    assert rule.format is not None
    selection, report = Selection(rule.format, skip), Report()
    if isinstance(weights, nn.Module):
        shared: dict[int, list[str]] = {}
        for module_names, (_, weight_id) in plan_layers(weights, selection, report, 3).items():
            shared.setdefault(weight_id, []).append(module_names[0])
        found = []
        for names in shared.values():
            n, k = _weight(weights, names[0]).shape
            found.append(_Layer(tuple(names), (n, k)))
        return found, report.left
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a model or a mapping, got {type(weights).__name__}")
    # A mapping may read a new tensor each time: an id is that of an earlier one while that lives.
    alive: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}
    layers = []
    selection.warn_unmatched(weights, stacklevel=3)
    for name in weights:
        if selection.skipped(name):
            report.left[name] = "skipped"
            continue
        weight = weights[name]
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.numel():
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name}: weight must be a non-empty (N, K) matrix, got {got}")
        known, names = alive.get(id(weight), (None, []))
        if known is None or known() is not weight:
            names = []
            alive[id(weight)] = weakref.ref(weight), names
            layers.append((names, (weight.shape[0], weight.shape[1])))
        names.append(name)
    return [_Layer(tuple(names), shape) for names, shape in layers], report.left


def _features(
    layers: Sequence[_Layer], model: nn.Module, importance: Mapping[str, Tensor]
) -> dict[str, float | Tensor]:
    """That of every layer and no other, where the layers are."""
    found: dict[str, float | Tensor] = {}
    for name in (name for layer in layers for name in layer.names):
        if name not in importance:
            raise ValueError(
                f"importance has no entry of {name!r}, which cannot be compared with layers that have one: give it, or "
                "skip the layer"
            )
        found[name] = importance[name].to(_weight(model, name).device)
    return found


def _calibrated(
    layers: Sequence[_Layer],
    rules: Sequence[Rule],
    model: nn.Module,
    batches: Sequence[Any],
    objective: str,
    features: Mapping[str, float | Tensor] | None,
    progress: bool,
) -> list[list[Option]]:
    """The options of every layer, in order, by what the dense model says."""
    kl, runs = objective == "kl", objective == "measured"
    # Methods learn from the inputs alone, whatever the objective.
    learning = objective == "output" or (
        features is None and any(calibrates(rule.method) for rule in rules)
    )
    firsts = {layer.names[0] for layer in layers}
    parts = list(chunks(model, (layer.names for layer in layers), firsts, copies=kl + learning))
    steps = len(layers) * len(rules) + len(parts) * (kl + learning) * len(batches)
    steps += runs * (len(layers) * len(rules) + 1) * len(batches)
    measured = []
    candidates: list[tuple[str, list[QuantTensor]]] = []
    silent: list[str] = []
    with bar(steps, "measuring", progress) as advance:
        for part in parts:
            every = [name for names in part for name in names]
            fisher, inputs = {}, {}
            if kl:
                fisher = output_fisher(model, every, batches, advance)
            if learning:
                inputs = calibrate(model, every, set(every), batches, advance)
            for names in part:
                own = [inputs.pop(name) for name in names if learning]
                silent += [name for name, x in zip(names, own, strict=False) if x.missing]
                with _naming(names[0]):
                    uses = [_of_inputs(x) for x in own if objective == "output"]
                    uses += [
                        _Sensitivity(fisher[n].inputs, fisher.pop(n).outputs) for n in names if kl
                    ]
                    learned: Inputs | None = own[0] if own else None
                    if features is not None:
                        learned = _Sensitivity(features[names[0]])
                    weight = _weight(model, names[0])
                    made: list[QuantTensor] | None = [] if runs else None
                    measured.append(_measure(weight, rules, learned, uses, advance, made))
                    if made is not None:
                        candidates.append((names[0], made))
        if runs:
            found = divergences(model, candidates, batches, advance)
            measured = [
                [
                    replace(option, error=error)
                    for option, error in zip(options, errors, strict=True)
                ]
                for options, errors in zip(measured, found, strict=True)
            ]
    if silent:
        if len(silent) == sum(len(layer.names) for layer in layers):
            raise ValueError("calibration is empty or 0: it says nothing of any layer")
        warnings.warn(
            f"calibration says nothing of {listed(silent)}: their errors count 0", stacklevel=3
        )
    return measured


def _of_inputs(inputs: InputStatistics) -> _Sensitivity:
    return _Sensitivity(0.0 if inputs.missing else inputs.hessian)


def _given(
    layers: Sequence[_Layer],
    rules: Sequence[Rule],
    weights: nn.Module | Mapping[str, Tensor],
    sensitivities: Mapping[str, float | Tensor] | None,
    progress: bool,
) -> list[list[Option]]:
    """The options of every layer, in order, by what is known of it."""
    if sensitivities is None:
        uses = [[_Sensitivity(1.0)] for _ in layers]
    else:
        uses = [[_checked(layer, name, sensitivities) for name in layer.names] for layer in layers]
        if unknown := sorted(sensitivities.keys() - {n for la in layers for n in la.names}):
            raise ValueError(f"sensitivities has names that are no layers: {unknown[:8]}")
    measured = []
    with bar(len(layers) * len(rules), "measuring", progress) as advance:
        for layer, own in zip(layers, uses, strict=True):
            with _naming(layer.names[0]):
                inputs = own[0] if isinstance(own[0].value, Tensor) else None
                weight = _weight(weights, layer.names[0])
                measured.append(_measure(weight, rules, inputs, own, advance))
    return measured


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the name before the messages of errors."""
    try:
        yield
    except (TypeError, ValueError) as e:
        raise type(e)(f"{name}: {e}") from e


def _weight(weights: nn.Module | Mapping[str, Tensor], name: str) -> Tensor:
    if isinstance(weights, nn.Module):
        return matrix_of(weights.get_submodule(name))
    return weights[name].detach()


@torch.no_grad()
def _measure(
    weight: Tensor,
    rules: Sequence[Rule],
    inputs: Inputs | None,
    uses: Sequence[_Sensitivity],
    advance: Callable[[], object],
    kept: list[QuantTensor] | None = None,
) -> list[Option]:
    """Makes every candidate; `inputs`, what methods learn from, are those of the first use, as in
    `quantize_model`. What is made is added to `kept`.
    """
    options = []
    for rule in rules:
        qt = informed(rule, inputs)[0](None, weight)
        options.append(Option(rule, qt.nbytes, sum(use.error(weight, qt) for use in uses)))
        if kept is not None:
            kept.append(qt)
        advance()
    return options


def _checked(layer: _Layer, name: str, sensitivities: Mapping[str, float | Tensor]) -> _Sensitivity:
    k = layer.shape[1]
    if name not in sensitivities:
        raise ValueError(f"sensitivities has nothing for {name}")
    value = sensitivities[name]
    if isinstance(value, Tensor):
        if tuple(value.shape) not in ((k,), (k, k)) or not value.is_floating_point():
            raise ValueError(
                f"{name}: a sensitivity must be a number or a floating tensor of shape ({k},) or "
                f"({k}, {k}), got {value.dtype} of shape {tuple(value.shape)}"
            )
        diagonal = value if value.dim() == 1 else value.diagonal()
        fine = bool(torch.isfinite(value).all()) and bool((diagonal >= 0).all())
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a sensitivity must be a number or a tensor, got {value!r}")
    else:
        fine = 0 <= value < math.inf
    if not fine:
        raise ValueError(f"{name}: a sensitivity must be finite and not negative")
    return _Sensitivity(value)
