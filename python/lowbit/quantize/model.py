"""quantize_model: swaps the linears (and, by recipe, embeddings) of a model for quantized ones, in
place.

One layer at a time: its dense weight can be freed before the next one is made, so memory peaks near
one layer above the result. Modules and weights that were shared stay shared. Calibration runs the
model once for every chunk of layers whose statistics fit in memory, with the chunks before it
quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.nn import fuse as fuse_siblings
from lowbit.quantize.calibrate import InputStatistics, as_batches, attach, collect, run
from lowbit.quantize.methods import METHODS, keywords, quantize
from lowbit.quantize.names import Recipe, Selection
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
    format: Recipe,
    *,
    skip: Iterable[str] = ("lm_head",),
    method: str | None = None,
    progress: bool = True,
    fuse: bool = True,
    calibration: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    observer: str | None = None,
) -> Report:
    """Quantizes a model in place.

    Args:
        model: any module. Its `nn.Linear` layers become `lowbit.nn.QuantLinear`; everything else
            stays, but for an `nn.Embedding` that a recipe names.
        format: a Format or its name for every linear, or a recipe {pattern: format or None}: the
            first pattern that matches the module's name counts, and no match means None, "leave
            it". How a pattern matches: `lowbit.quantize.Selection`.
        skip: patterns of modules to leave as they are.
        method: as in `lowbit.quantize`.
        progress: show a bar on stderr, if rich or tqdm is installed.
        fuse: let q/k/v and gate/up projections compute their products together, bit for bit as
            before: `lowbit.nn.fuse`. State dicts stay per layer.
        calibration: inputs of the model, each a tensor, a tuple of arguments or a mapping of
            keywords; for "gptq", which needs it, for "kmeans" and "multibit", where a weight then
            counts the mean square of its input, and for `observer`, which needs it. Layers are
            calibrated in the order of `named_modules`, with
            those before them quantized. Embeddings take no part: they get the default method of
            their format, and so does a linear that shares the weight of one.
        options: further keywords of the method, as `{"act_order": True}`.
        observer: one of `OBSERVERS`, "minmax", "ema", "percentile", "mse" or "kl": layers whose format
            quantizes activations (suffix _a8 or _a8t) then do so by one scale that it finds (static
            quantization), not by one per row of x.

    Returns:
        Bytes and error per layer, and the reason for every weight that was left.

    Raises:
        TypeError, ValueError: an argument is wrong, or a weight cannot be quantized (the message
            starts with the layer's name; the layers before it are quantized then); the method
            needs calibration, or takes none; no input reaches a layer; there is an observer and no
            format quantizes activations.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    selection = Selection(format, skip)
    report = Report()
    plan = _plan(model, selection, report)
    made: dict[tuple[int, str], tuple[str, PackedModule]] = {}
    batches = None if calibration is None else as_batches(calibration)
    observed = _observers(model, plan, observer)
    _check_calibration(method, batches is not None, observer)
    counts = keywords(method).keys() & {"hessian", "weights"} if method else set()
    chunks = [list(plan)] if batches is None else list(_chunks(model, plan))
    steps = len(plan) + len(chunks) * len(batches or ())
    with bar(steps, "quantizing", progress) as advance:
        for chunk in chunks:
            statistics: dict[str, InputStatistics] = {}
            if batches is not None:
                names_of = [n[0] for n in chunk]
                linears = [n for n in names_of if isinstance(model.get_submodule(n), nn.Linear)]
                here = {n: observed[n] for n in names_of if n in observed}
                with (
                    collect(model, linears if counts else (), hessian="hessian" in counts) as found,
                    attach(model, here),
                ):
                    run(model, batches, advance)
                statistics = found
            for names in chunk:
                chosen, weight_id = plan[names]
                first = made.get((weight_id, chosen.spec))
                inputs = statistics.pop(names[0], None)
                try:
                    how = _Method(method, options or {}, inputs)
                    module, row = _replace(model, names[0], chosen, how, first)
                    if names[0] in observed:
                        assert isinstance(module, QuantLinear)
                        module.set_input_scale(observed.pop(names[0]).grid().scale)
                except (TypeError, ValueError) as e:
                    raise type(e)(f"{names[0]}: {e}") from e
                made.setdefault((weight_id, chosen.spec), (names[0], module))
                for name in names:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module)
                report.layers.append(row)
                advance()
    if fuse:
        fuse_siblings(model)
    return report


@dataclass(frozen=True)
class _Method:
    """A method with what it is given besides the weight and the format."""

    name: str | None
    options: Mapping[str, Any]
    inputs: InputStatistics | None

    def __call__(self, dense: nn.Module, weight: Tensor, format: Format) -> QuantTensor:
        if self.inputs is None:
            calibrated = "hessian" in keywords(self.name) if self.name else False
            if calibrated and isinstance(dense, nn.Embedding):
                return quantize(weight, format)
            return quantize(weight, format, self.name, **self.options)
        if "hessian" in keywords(self.name or ""):
            given = {"hessian": self.inputs.hessian}
        else:
            given = {"weights": self.inputs.diagonal.expand(weight.shape)}
        return quantize(weight, format, self.name, **given, **self.options)


def _observers(
    model: nn.Module, plan: Mapping[Names, tuple[Format, int]], observer: str | None
) -> dict[str, Observer]:
    """One for every linear whose format quantizes activations, by its first name."""
    if observer is None:
        return {}
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {sorted(OBSERVERS)}, got {observer!r}")
    made = {
        names[0]: OBSERVERS[observer]()
        for names, (format, _) in plan.items()
        if format.activation is not None and isinstance(model.get_submodule(names[0]), nn.Linear)
    }
    if not made:
        raise ValueError(
            f"observer {observer!r} is for linears whose format quantizes activations (suffix _a8 "
            "or _a8t), the model has none"
        )
    return made


def _check_calibration(method: str | None, given: bool, observer: str | None) -> None:
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    known = keywords(method).keys() if method else set()
    if observer is not None and not given:
        raise ValueError(f"observer {observer!r} needs calibration: inputs of the model")
    if given and observer is None and not known & {"hessian", "weights"}:
        raise ValueError(f"method {method!r} takes no calibration: use 'gptq' or 'kmeans'")
    if "hessian" in known and not given:
        raise ValueError(f"method {method!r} needs calibration: inputs of the model")


def _chunks(model: nn.Module, plan: Mapping[Names, object]) -> Iterator[list[Names]]:
    """Runs of layers whose Hessians fit in memory together."""
    chunk: list[Names] = []
    used = 0
    for names in plan:
        module = model.get_submodule(names[0])
        size = 4 * module.in_features**2 if isinstance(module, nn.Linear) else 0
        if chunk and used + size > _HESSIAN_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(names)
        used += size
    if chunk:
        yield chunk


def _plan(
    model: nn.Module, selection: Selection, report: Report
) -> dict[Names, tuple[Format, int]]:
    """Every name of each module to replace, with its format and the identity of its weight.

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
            chosen = selection.format(name)
            why = _obstacle(module, name, selection, key in fused)
            if why or chosen is None:
                report.left[name] = why or "not in the recipe"
            elif not name:
                raise ValueError(
                    "model must contain the layers to replace, it is one itself "
                    f"({type(module).__name__}): use QuantLinear.from_linear or "
                    "QuantEmbedding.from_embedding"
                )
            else:
                plan[tuple(names[key])] = (chosen, id(weight))
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
    format: Format,
    method: _Method,
    first: tuple[str, PackedModule] | None,
) -> tuple[PackedModule, LayerReport]:
    """Makes the quantized module of the dense one `name`; `first` has quantized the same weight
    already.
    """
    dense: Any = model.get_submodule(name)
    weight = dense.weight.detach()
    qt = first[1].quant_tensor() if first else method(dense, weight, format)
    row = measure(name, weight, qt)
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
