"""quantize_model: swaps the linears (and, by recipe, embeddings) of a model for quantized ones, in
place.

One layer at a time: its dense weight can be freed before the next one is made, so memory peaks near
one layer above the result. Modules and weights that were shared stay shared. Calibration runs the
model once for every chunk of layers whose statistics fit in memory, with the chunks before it
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn import fuse as fuse_siblings
from lowbit.quantize.calibrate import InputStatistics, as_batches, attach, calibrate
from lowbit.quantize.methods import (
    calibrates,
    check_options,
    default_method,
    keywords,
    quantize,
)
from lowbit.quantize.names import Rule, Rules, Selection
from lowbit.quantize.observers import OBSERVERS, Observer
from lowbit.quantize.progress import bar
from lowbit.quantize.report import LayerReport, Report, measure
from lowbit.tensor import QuantTensor

# They hand the weights of their children to fused kernels of torch without calling the children.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# The Hessians of one chunk of layers take at most this, or are one.
_HESSIAN_BYTES = 1 << 31
Names = tuple[str, ...]  # of one module


def quantize_model(
    model: nn.Module,
    format: Rules,
    *,
    skip: Iterable[str] = ("lm_head",),
    method: str | None = None,
    progress: bool = True,
    fuse: bool = False,
    calibration: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    observer: str | None = None,
    sensitivities: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[str, Tensor, QuantTensor], object] | None = None,
) -> Report:
    """Quantizes a model in place.

    Args:
        model: any module. Its `nn.Linear` layers become `lowbit.nn.QuantLinear`; everything else
            stays, but for an `nn.Embedding` that a recipe names.
        format: a Format or its name for every linear, or a recipe {pattern: format, `Rule` or
            None}, as a `Recipe` or `allocate` makes it: the first pattern that matches the module's
            name counts, and no match means None, "leave it". How a pattern matches:
            `lowbit.quantize.Selection`.
        skip: patterns of modules to leave as they are.
        method: as in `lowbit.quantize`, for every layer whose rule has none.
        progress: show a bar on stderr, if rich or tqdm is installed.
        fuse: let q/k/v and gate/up projections compute their products together, bit for bit as
            before: `lowbit.nn.fuse`. State dicts stay per layer.
        calibration: inputs of the model, each a tensor, a tuple of arguments or a mapping of
            keywords; for "gptq", which needs it, for "kmeans", "lloyd" and "multibit", where a weight
            then counts the mean square of its input, and for `observer`, which needs it. Layers are
            calibrated in the order of `named_modules`, with
            those before them quantized. Embeddings take no part: they get the default method of
            their format, and so does a linear that shares the weight of one.
        options: further keywords of the method, as `{"act_order": True}`.
        observer: one of `OBSERVERS`, "minmax", "ema", "percentile", "mse" or "kl": layers whose format
            quantizes activations (suffix _a8 or _a8t) then do so by one scale that it finds (static
            quantization), not by one per row of x.
        sensitivities: what an error of each weight counts, (N, K) by the name of a layer, as
            `fisher_diagonal` finds it; for the methods that take `weights`, instead of calibration.
            Layers without one are quantized as without calibration.
        on_layer: called with the name, the dense weight and what was made of it, once for every
            weight that is quantized.

    Returns:
        Bytes and error per layer, and the reason for every weight that was left.

    Raises:
        TypeError, ValueError: an argument is wrong, or a weight cannot be quantized (the message
            starts with the layer's name; the layers before it are quantized then); the method
            needs calibration, or takes none; no input reaches a layer; there is an observer and no
            format quantizes activations; a layer that `sensitivities` names takes none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    selection = Selection(format, skip)
    report = Report()
    plan = {
        names: (rule.completed(method, options or {}), weight_id)
        for names, (rule, weight_id) in plan_layers(model, selection, report).items()
    }
    made: dict[tuple[int, str], tuple[str, PackedModule]] = {}
    batches = None if calibration is None else as_batches(calibration)
    rules = [rule for rule, _ in plan.values()] or [Rule(None, method)]
    check_rules(rules, batches is not None)
    _check_sensitivities(plan, sensitivities or {}, batches is not None)
    observed = _observers(model, plan, observer, batches is not None)
    methods = dict.fromkeys(rule.method for rule in rules)
    if batches is not None and not observed and not any(map(calibrates, methods)):
        listed = " and ".join(map(repr, methods))
        raise ValueError(f"method {listed} takes no calibration: use 'gptq' or 'kmeans'")
    # Linears that learn from calibration, and whether a Hessian.
    learning = {
        names[0]: "hessian" in keywords(rule.method or "")
        for names, (rule, _) in plan.items()
        if calibrates(rule.method) and isinstance(model.get_submodule(names[0]), nn.Linear)
    }
    hessians = {name for name, wanted in learning.items() if wanted}
    parts = list(chunks(model, plan, hessians)) if batches is not None else [list(plan)]
    steps = len(plan) + len(parts) * len(batches or ())
    with bar(steps, "quantizing", progress) as advance:
        for chunk in parts:
            statistics: dict[str, InputStatistics] = {}
            if batches is not None:
                firsts = [names[0] for names in chunk]
                wanted = [name for name in firsts if name in learning]
                with attach(model, {name: observed[name] for name in firsts if name in observed}):
                    statistics = calibrate(model, wanted, hessians, batches, advance)
            for names in chunk:
                rule, weight_id = plan[names]
                assert rule.format is not None
                key = weight_id, rule.format.spec
                first = made.get(key)
                try:
                    # No name for the statistics: they go when the layer is done.
                    how = Method(
                        rule, statistics.pop(names[0], None) or _given(names, sensitivities)
                    )
                    module, row = _replace(model, names[0], how, first, on_layer)
                    del how
                    if names[0] in observed:
                        assert isinstance(module, QuantLinear)
                        module.set_input_scale(observed.pop(names[0]).grid().scale)
                except (TypeError, ValueError) as e:
                    raise type(e)(f"{names[0]}: {e}") from e
                made.setdefault(key, (names[0], module))
                for name in names:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module)
                report.layers.append(row)
                advance()
    if fuse:
        fuse_siblings(model)
    return report


class Inputs(Protocol):
    """What a method may ask for: the second moment of a linear's inputs, or its diagonal."""

    @property
    def hessian(self) -> Tensor:
        """(K, K)."""

    @property
    def diagonal(self) -> Tensor:
        """(K,)."""


@dataclass(frozen=True)
class Method:
    """A completed rule with what its method learns from calibration."""

    rule: Rule
    inputs: Inputs | None

    def __call__(self, dense: nn.Module | None, weight: Tensor) -> QuantTensor:
        """Quantizes the weight of `dense`; an embedding has no inputs, whatever the method."""
        format, method = self.rule.format, self.rule.method
        assert format is not None
        given = {}
        if self.inputs is not None and calibrates(method):
            wanted = "hessian" in keywords(method or "")
            given = (
                {"hessian": self.inputs.hessian} if wanted else {"weights": self.inputs.diagonal}
            )
        elif isinstance(dense, nn.Embedding) and method and "hessian" in keywords(method):
            return quantize(weight, format)
        return quantize(weight, format, method, **given, **self.rule.options)


@dataclass(frozen=True)
class _Given:
    """A sensitivity in the place of what calibration finds."""

    diagonal: Tensor  # (N, K)

    @property
    def hessian(self) -> Tensor:
        raise ValueError("a sensitivity of each weight is no Hessian")


def _given(names: Names, sensitivities: Mapping[str, Tensor] | None) -> _Given | None:
    found = [t for name, t in (sensitivities or {}).items() if name in names]
    return _Given(found[0]) if found else None


def _check_sensitivities(
    plan: Mapping[Names, tuple[Rule, int]], sensitivities: Mapping[str, Tensor], calibrated: bool
) -> None:
    if sensitivities and calibrated:
        raise ValueError("give calibration or sensitivities, not both")
    methods = {name: rule.method for names, (rule, _) in plan.items() for name in names}
    for name in sensitivities:
        if name not in methods:
            raise ValueError(f"sensitivities names {name!r}, which is not a layer to quantize")
        method = methods[name]
        if method is None or "weights" not in keywords(method):
            raise ValueError(f"{name}: method {method!r} takes no sensitivities: use 'kmeans'")


def _observers(
    model: nn.Module,
    plan: Mapping[Names, tuple[Rule, int]],
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
        and isinstance(model.get_submodule(names[0]), nn.Linear)
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
    chunk: list[Names] = []
    used = 0
    for names in plan:
        features: Any = getattr(model.get_submodule(names[0]), "in_features", 0)
        size = 4 * copies * features**2 if names[0] in hessians else 0
        if chunk and used + size > _HESSIAN_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(names)
        used += size
    if chunk:
        yield chunk


def plan_layers(
    model: nn.Module, selection: Selection, report: Report
) -> dict[Names, tuple[Rule, int]]:
    """Every name of each module to replace, with its rule and the identity of its weight; what is
    left is noted in the report.

    It must not keep the modules alive.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    fused: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        if isinstance(module, READS_WEIGHTS):
            fused.update(id(child) for child in module.children())
    plan = {}
    for key, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(module, PackedModule) or (
            isinstance(weight, nn.Parameter) and weight.dim() > 1
        ):
            name = names[key][0]
            rule = selection.rule(name)
            why = _obstacle(module, name, selection, key in fused)
            if why or rule.format is None:
                report.left[name] = why or "not in the recipe"
            elif not name:
                raise ValueError(
                    "model must contain the layers to replace, it is one itself "
                    f"({type(module).__name__}): use QuantLinear.from_linear or "
                    "QuantEmbedding.from_embedding"
                )
            else:
                plan[tuple(names[key])] = (rule, id(weight))
    return plan


def _obstacle(module: nn.Module, name: str, selection: Selection, fused: bool) -> str | None:
    """Why a module cannot be replaced, whatever the recipe says."""
    kind = type(module).__name__
    if isinstance(module, PackedModule):
        return f"already quantized to {module.format.name}"
    if selection.skipped(name):
        return "skipped"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{kind} has a forward of its own"
        if fused:
            return f"the parent of this {kind} reads its weight directly"
        return None
    if isinstance(module, nn.Embedding):
        if not selection.by_name:
            return "an embedding is quantized only if a recipe names it"
        if type(module).forward is not nn.Embedding.forward:
            return f"{kind} has a forward of its own"
        if module.max_norm is not None:
            return "max_norm changes the weight in forward"
        return None
    return f"{kind} has no quantized form"


def _replace(
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
    weight = dense.weight.detach()
    qt = first[1].quant_tensor() if first else method(dense, weight)
    row = measure(name, weight, qt)
    if on_layer is not None and not first:
        on_layer(name, weight, qt)
    made: PackedModule
    if isinstance(dense, nn.Embedding):
        made = QuantEmbedding.from_quant_tensor(qt, weight.dtype, dense.padding_idx)
        if first:
            made.share_weight(first[1])
    elif first:
        made = QuantLinear.tied_to(first[1], dense.bias)
    else:
        made = QuantLinear.from_quant_tensor(qt, dense.bias)
    return made.train(dense.training), replace(row, tied_to=first[0] if first else None)
