"""quantize_model: swaps the linears and convolutions (and, by recipe, embeddings) of a model for quantized ones, in
place.

One layer at a time. Modules and weights that were shared stay shared. Calibration runs the model once
for every chunk of layers whose statistics fit in memory, with the chunks before it quantized.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from lowbit import late
from lowbit.methods.fitting import check_importance
from lowbit.methods.grid import check_weight
from lowbit.methods.registry import calibrates, check_options, default_method, keywords, quantize
from lowbit.nn import PackedModule, QuantLinear
from lowbit.nn import fuse as fuse_siblings
from lowbit.nn.conv import CONVOLUTIONS, matrix_of, packed_conv
from lowbit.nn.embedding import packed_embedding
from lowbit.nn.names import Rule, Rules, Selection, listed, rules_of, skip_of
from lowbit.nn.product import PackedProduct
from lowbit.nn.stand_ins import stand_ins
from lowbit.ptq.calibration import (
    InputStatistics,
    SplitStatistics,
    as_batches,
    attach,
    calibrate,
    parts,
)
from lowbit.ptq.convolutions import add_notes, fitting
from lowbit.ptq.given import (
    Given,
    Plan,
    check_one_of,
    check_sensitivities,
    of_features,
    of_weights,
    with_method,
)
from lowbit.ptq.importance import as_importance
from lowbit.ptq.inputs import features_of, multiplies_rows
from lowbit.ptq.observers import OBSERVERS, Observer
from lowbit.ptq.plan import Names, plan_layers
from lowbit.ptq.progress import bar
from lowbit.ptq.report import LayerReport, Report, measure
from lowbit.ptq.scaling import SCALINGS, base_rule, check_scaling, note_unscaled, scaled
from lowbit.ptq.swap import Swap, swapping
from lowbit.weights.quantized import QuantTensor


def quantize_model(
    model: nn.Module,
    format: Rules | None = None,
    *,
    skip: Iterable[str] | None = None,
    method: str | None = None,
    progress: bool = True,
    fuse: bool = False,
    calibration: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    observer: str | None = None,
    sensitivities: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None = None,
    atomic: bool = True,
    bits: int | None = None,
    group_size: int | None = None,
    modules_to_not_convert: Iterable[str] | None = None,
) -> Report:
    """Quantizes a model in place.

    If it raises anything, the model is as it was before. For that the dense layers stay in memory
    until the end, so that memory peaks at the dense model, which is there at the start, plus the
    result; `atomic=False` frees each at once.

    A layer that calibration says nothing of (no input has reached it, as an expert that a router
    never picks, or all of them were 0) is quantized as without calibration, with the default method
    of its format if its own one needs calibration, and has no static scale of activations. Its row
    in the report has a note, and there is one warning.

    Args:
        model: any module. Its `nn.Linear` layers become `lowbit.nn.QuantLinear`, and so do GPT-2's Conv1D, Falcon's
            linears and each of the fused experts of transformers, which are layers of a `lowbit.nn.QuantExperts`
            then. Convolutions become a `lowbit.nn.QuantConv` (`lowbit.fold_norms` takes their batch norms along),
            those with groups with activations as they are. Everything else stays, but for an `nn.Embedding` that
            a recipe names.
        format: a Format or its name for every linear, as "km4" (4.25 bits), "km3" or "km2_g16": of the
            formats with a code for every weight these have the least error for their bits, and with
            two tables, "km4x2", less still. Or a recipe {pattern: format, `Rule` or None}, as a
            `Recipe` or `allocate` makes it: the first pattern that matches the module's name counts,
            and no match means None, "leave it". How a pattern matches: `lowbit.ptq.Selection`.
        skip: patterns of modules to leave as they are, by default the head, "lm_head".
        method: as in `lowbit.quantize`, for every layer whose rule has none; or "awq" (option
            `grid`) or "smoothquant" (`alpha`), which need calibration: scales are folded into the
            layers before, where the model stays the same function, and the weights then quantized
            by the default method of their format. A layer that no other takes the scales of is
            quantized without, with a note in the report. With `atomic` the dense weights are in
            memory twice.
        progress: show a bar on stderr, if rich or tqdm is installed.
        fuse: let q/k/v and gate/up projections compute their products together, bit for bit as
            before: `lowbit.nn.fuse`. State dicts stay per layer.
        calibration: inputs of the model, each a tensor, a tuple of arguments or a mapping of
            keywords; for "gptq", which needs it, for "kmeans", "lloyd", "multibit" and "search", where a
            weight then counts the mean square of its input, and for `observer`, which needs it. Tokens that
            an `attention_mask` (batch, tokens) hides do not count. Layers are calibrated in the order
            of `named_modules`, with those before them quantized. Embeddings take no part: they get
            the default method of their format, and so does a linear that shares the weight of one.
        options: further keywords of the method, as `{"act_order": True}`; with `{"damping": "auto"}`
            "gptq" holds out a quarter of the tokens.
        observer: one of `OBSERVERS`, "minmax", "ema", "percentile", "mse" or "kl": layers whose format
            quantizes activations (suffix _a8 or _a8t) then do so by one scale that it finds (static
            quantization), not by one per row of x.
        sensitivities: the importance of an error of each weight, (N, K) by the name of a layer, as
            `fisher_diagonal` finds it; for the methods that take `weights`, instead of calibration.
            Layers without one are quantized as without calibration.
        importance: what each input feature of a layer counts, instead of calibration: an imatrix
            file, of llama.cpp or of `save_importance`, or (K,) by the name of a linear, as
            `load_importance` reads it. For the methods that take `weights`, the default one of a
            format included. A linear without one is quantized as without calibration; its row in
            the report has a note.
        on_layer: called with the name, the dense weight and its quantization, once for every
            weight that is quantized.
        atomic: whether the model is put back if something raises. If not, the layers before are
            quantized then; a note of the error says up to which.
        bits, group_size: integers of so many bits instead of a format, and the weights that share a scale (-1: a
            row) in place of those of the format: `lowbit.nn.names.rules_of`.
        modules_to_not_convert: the name that transformers has for `skip`.

    Returns:
        Bytes and error per layer, and the reason for every parameter of two or more dimensions that
        was left.

    Warns:
        UserWarning: more than 5 % of the weights stay dense that nobody asked to leave (`Report`
            says which count), a pattern matches nothing in the model, calibration or importance says
            nothing of a layer, or an imatrix has entries that are of no layer.

    Raises:
        TypeError, ValueError: an argument is wrong, or a weight cannot be quantized (the message
            starts with the layer's name); the method needs calibration, or takes none; no input
            reaches any layer; there is an observer and no format quantizes activations; a layer
            that `sensitivities` names takes none; `importance` is of another model, has another
            length, or holds NaN, inf or zeros alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    selection = Selection(rules_of(format, bits, group_size), skip_of(skip, modules_to_not_convert))
    report = Report()
    with stand_ins(model):
        plan = {
            names: (rule.completed(method, options or {}), weight_id)
            for names, (rule, weight_id) in plan_layers(model, selection, report).items()
        }
        batches = None if calibration is None else as_batches(calibration)
        features = as_importance(importance, model)
        if features is not None:
            plan = {
                names: (with_method(rule), weight_id) for names, (rule, weight_id) in plan.items()
            }
        fitted = {
            names: fitting(model.get_submodule(names[0]), rule, batches is not None)
            for names, (rule, _) in plan.items()
        }
        plan = {names: (fitted[names][0], weight_id) for names, (_, weight_id) in plan.items()}
        scalings = _scalings(model, plan, batches is not None)
        plan = {names: (base_rule(rule), weight_id) for names, (rule, weight_id) in plan.items()}
        rules = [rule for rule, _ in plan.values()] or [Rule(None, method)]
        check_rules(rules, batches is not None)
        check_one_of(
            calibration=calibration, sensitivities=sensitivities or None, importance=importance
        )
        check_sensitivities(plan, sensitivities or {})
        given = of_weights(plan, sensitivities or {})
        if features is not None:
            given = of_features(model, plan, features)
        check_layers(model, plan, given)
        observed = _observers(model, plan, observer, batches is not None)
        methods = dict.fromkeys(rule.method for rule in rules)
        learns = bool(observed or scalings) or any(map(calibrates, methods))
        if batches is not None and not learns:
            listing = " and ".join(map(repr, methods))
            raise ValueError(f"method {listing} takes no calibration: use 'gptq' or 'kmeans'")
        # Linears that learn from calibration, and whether a Hessian.
        learning = {
            names[0]: "hessian" in keywords(rule.method or "")
            for names, (rule, _) in plan.items()
            if calibrates(rule.method) and multiplies_rows(model.get_submodule(names[0]))
        }
        hessians = {name for name, wanted in learning.items() if wanted}
        split = {
            names[0]
            for names, (rule, _) in plan.items()
            if names[0] in hessians and rule.options.get("damping") == "auto"
        }
        copies = 2 if split else 1
        runs = list(chunks(model, plan, hessians, copies)) if batches is not None else [list(plan)]
        steps = len(plan) + len(runs) * len(batches or ())
        made: dict[tuple[int, str], tuple[str, PackedModule]] = {}
        calibrated = {*learning, *observed}
        with (
            swapping(model, keep=atomic) as swap,
            scaled(model, scalings, batches or (), atomic) as folded,
            bar(steps, "quantizing", progress) as advance,
        ):
            for chunk in runs:
                statistics: dict[str, InputStatistics | SplitStatistics] = {}
                if batches is not None:
                    firsts = [names[0] for names in chunk]
                    statistics = {
                        name: SplitStatistics.of(model, name) for name in firsts if name in split
                    }
                    rest = [name for name in firsts if name in learning and name not in split]
                    watched = {name: observed[name] for name in firsts if name in observed}
                    with attach(model, watched), attach(model, statistics):
                        statistics |= calibrate(model, rest, hessians, batches, advance)
                for names in chunk:
                    rule, weight_id = plan[names]
                    assert rule.format is not None
                    key = weight_id, rule.format.spec
                    try:
                        # No name for the statistics: they go when the layer is done.
                        how, note = informed(
                            rule, statistics.pop(names[0], None) or given.get(names[0])
                        )
                        first = made.get(key)
                        module, row = _make(model, names[0], how, first, on_layer)
                        del how
                        note = None if first else note
                        if names[0] in observed:
                            note = _set_input_scale(module, observed.pop(names[0])) or note
                    except (TypeError, ValueError) as e:
                        raise type(e)(f"{names[0]}: {e}") from e
                    if swap_or_leave(swap, names, module, replace(row, note=note), report):
                        made.setdefault(key, (names[0], module))
                    advance()
            source = "calibration" if features is None else "importance"
            check_notes(report, calibrated, source, stacklevel=2)
            note_unscaled(report, scalings, folded)
            add_notes(report, {names[0]: note for names, (_, note) in fitted.items()})
            if fuse:
                fuse_siblings(model)
    late.quantized(model)
    return report


def swap_or_leave(
    swap: Swap, names: Names, module: nn.Module, row: LayerReport, report: Report
) -> bool:
    """Replaces a layer and adds its row to the report; or notes there, with a warning, what hinders
    that, as an attribute of the layer that has the name of something of the new one.
    """
    try:
        swap(names, module)
    except NotImplementedError as e:
        report.leave(names[0], str(e), {f"{names[0]}.weight": math.prod(row.shape)})
        warnings.warn(f"{names[0]} stays dense: {e}", stacklevel=3)
        return False
    report.layers.append(row)
    return True


class Inputs(Protocol):
    """What a method may ask for, up to a factor: the second moment of a linear's inputs, or its
    diagonal.
    """

    @property
    def relative_hessian(self) -> Tensor:
        """(K, K)."""

    @property
    def relative_diagonal(self) -> Tensor:
        """(K,)."""


@dataclass(frozen=True)
class Method:
    """A completed rule with what its method learns from calibration."""

    rule: Rule
    inputs: Inputs | None

    @property
    def hessian(self) -> Tensor | None:
        """The second moment of the inputs up to a factor, if the method has asked for it."""
        method = self.rule.method
        if self.inputs is None or method is None or "hessian" not in keywords(method):
            return None
        return self.inputs.relative_hessian

    def __call__(self, dense: nn.Module | None, weight: Tensor) -> QuantTensor:
        """Quantizes the weight of `dense`; an embedding has no inputs, whatever the method."""
        format, method = self.rule.format, self.rule.method
        assert format is not None
        given = {}
        if self.inputs is not None and calibrates(method):
            if "hessian" in keywords(method or ""):
                given = {"hessian": self.inputs.relative_hessian}
                if isinstance(self.inputs, SplitStatistics):
                    given["held_out"] = self.inputs.relative_held_out
            else:
                given = {"weights": self.inputs.relative_diagonal}
        elif isinstance(dense, nn.Embedding) and method and "hessian" in keywords(method):
            return quantize(weight, format)
        return quantize(weight, format, method, **given, **self.rule.options)


def informed(rule: Rule, inputs: Inputs | None) -> tuple[Method, str | None]:
    """A rule with what calibration says of a layer. If that is nothing, the rule without
    calibration, and a note of it.
    """
    if not isinstance(inputs, InputStatistics | SplitStatistics | Given) or inputs.missing is None:
        return Method(rule, inputs), None
    if rule.method and "hessian" in keywords(rule.method):
        rule = Rule(rule.format)
    assert rule.format is not None
    name = rule.method or default_method(rule.format)
    return Method(rule, None), f"{inputs.missing}: quantized without calibration, by {name!r}"


def _set_input_scale(module: PackedModule, observer: Observer) -> str | None:
    """Makes the scale of a layer's activations static, or says why it is not."""
    assert isinstance(module, PackedProduct)
    if observer.missing is not None:
        return f"{observer.missing}: its activations have a scale per row of x"
    module.set_input_scale(observer.grid().scale)
    return None


def check_notes(
    report: Report, calibrated: Collection[str], source: str = "calibration", stacklevel: int = 2
) -> None:
    """Warns of the layers that calibration, or another source, says nothing of, by their notes.

    Raises:
        ValueError: they are all of the calibrated ones.
    """
    noted = [row for row in report.layers if row.note is not None]
    if not noted:
        return
    if not set(calibrated) - {row.name for row in noted}:
        raise ValueError(
            f"{source} is empty or 0, for every layer: {noted[0].name}: {noted[0].note}"
        )
    warnings.warn(
        f"{source} says nothing of {listed(row.name for row in noted)}: the rows of the report "
        "have notes of what was done",
        stacklevel=stacklevel + 1,
    )


def check_layers(model: nn.Module, plan: Plan, given: Mapping[str, Given]) -> None:
    """Raises what `lowbit.quantize` would of the weight of a layer and its sensitivity, with the
    layer's name, before anything is quantized.
    """
    for names, (rule, _) in plan.items():
        weight = matrix_of(model.get_submodule(names[0]))
        assert rule.format is not None
        try:
            check_weight(weight, rule.format.matrix)
            if names[0] in given:
                check_importance(given[names[0]].value, weight)
        except (TypeError, ValueError) as e:
            raise type(e)(f"{names[0]}: {e}") from e


def _observers(
    model: nn.Module,
    plan: Plan,
    observer: str | None,
    calibrated: bool,
) -> dict[str, Observer]:
    """One for every linear whose format quantizes activations, by its first name."""
    if observer is None:
        return {}
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {sorted(OBSERVERS)}, got {observer!r}")
    if not calibrated:
        raise ValueError(f"observer {observer!r} needs calibration: inputs of the model")
    made = {
        names[0]: OBSERVERS[observer]()
        for names, (rule, _) in plan.items()
        if rule.format is not None
        and rule.format.activation is not None
        and multiplies_rows(model.get_submodule(names[0]))
    }
    if not made:
        raise ValueError(
            f"observer {observer!r} is for linears whose format quantizes activations (suffix _a8 "
            "or _a8t), the model has none"
        )
    return made


def check_rules(rules: Iterable[Rule], calibrated: bool) -> None:
    """Compares the methods of completed rules with their options.

    Raises:
        TypeError, ValueError: as `check_options`; a method needs calibration and there is none.
    """
    for rule in rules:
        if rule.method in SCALINGS:
            raise ValueError(
                f"method {rule.method!r} changes layers before it quantizes them: it is for "
                "quantize_model with calibration"
            )
        name = rule.method or (default_method(rule.format) if rule.format else None)
        if name is not None:
            check_options(name, rule.options)
        if rule.method and "hessian" in keywords(rule.method) and not calibrated:
            raise ValueError(f"method {rule.method!r} needs calibration: inputs of the model")


def chunks(
    model: nn.Module, plan: Iterable[Names], hessians: Collection[str], copies: int = 1
) -> Iterator[list[Names]]:
    """Runs of layers whose Hessians fit in memory together: so many copies for each layer of which
    the first name is among `hessians`.
    """

    def hessian(names: Names) -> tuple[int, int]:
        return (copies if names[0] in hessians else 0), features_of(model.get_submodule(names[0]))

    return parts(plan, hessian)


def _scalings(model: nn.Module, plan: Plan, calibrated: bool) -> dict[str, Rule]:
    """The rules of linears that have scales folded before they are quantized."""
    for rule, _ in plan.values():
        if rule.method in SCALINGS:
            check_scaling(rule)
            if not calibrated:
                raise ValueError(f"method {rule.method!r} needs calibration: inputs of the model")
    return {
        names[0]: rule
        for names, (rule, _) in plan.items()
        if rule.method in SCALINGS and isinstance(model.get_submodule(names[0]), nn.Linear)
    }


def _make(
    model: nn.Module,
    name: str,
    method: Method,
    first: tuple[str, PackedModule] | None,
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None,
) -> tuple[PackedModule, LayerReport]:
    """Makes the quantized module of the dense one `name`; `first` has quantized the same weight
    already.
    """
    dense: Any = model.get_submodule(name)
    weight = matrix_of(dense)
    qt = first[1].quant_tensor() if first else method(dense, weight)
    row = measure(name, weight, qt, None if first else method.hessian)
    if on_layer is not None and not first:
        on_layer(name, weight, qt)
    made: PackedModule
    if isinstance(dense, nn.Embedding):
        made = packed_embedding(dense, qt, weight.dtype)
        if first:
            made.share_weight(first[1])
    elif isinstance(dense, CONVOLUTIONS):
        made = packed_conv(dense, qt, dense._parameters["bias"])
        if first:
            made.share_weight(first[1])
    elif first:
        made = QuantLinear.tied_to(first[1], dense.bias)
    else:
        made = QuantLinear.from_quant_tensor(qt, dense.bias)
    return made.train(dense.training), replace(row, tied_to=first[0] if first else None)
