"""AWQ and SmoothQuant for a whole model: scales are found for linears that read the output of one layer, and folded
into both (`smooth`).

Which layers those are is found by running the model: scales of 2 and 1/2 must not change a bit of its
outputs.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn.names import Rule
from lowbit.ptq.calibration import InputStatistics, calibrate, evaluating, forward, parts
from lowbit.ptq.report import Report
from lowbit.ptq.smooth import awq_scales, fold, smooth_scales

# Keywords with their defaults.
SCALINGS: dict[str, dict[str, float]] = {"awq": {"grid": 20}, "smoothquant": {"alpha": 0.5}}
# Linears of one parent whose products lie between them and another linear, feature by feature.
_PAIRS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))


@dataclass(frozen=True)
class Group:
    """A layer, and all linears that read its output."""

    previous: str
    linears: tuple[str, ...]


def check_scaling(rule: Rule) -> None:
    """Compares a rule's options with what its method, one of `SCALINGS`, takes.

    Raises:
        TypeError, ValueError: an option is unknown, of another kind, or out of range.
    """
    known = SCALINGS[rule.method or ""]
    for key, value in rule.options.items():
        if key not in known:
            raise ValueError(f"method {rule.method!r} takes no {key}")
        kind = numbers.Integral if isinstance(known[key], int) else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = type(known[key]).__name__
            raise TypeError(
                f"{key} of method {rule.method!r} must be {expected}, got {value!r:.100}"
            )
        if key == "grid" and value < 1:
            raise ValueError(f"grid must be at least 1, got {value}")
        if key == "alpha" and not 0 <= float(value) <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {value}")


@torch.no_grad()
def find_groups(model: nn.Module, batch: Any) -> list[Group]:
    """The groups whose scales can be folded: such as a norm with q/k/v, up with down.

    Args:
        model: dense. Its weights are as before when this returns.
        batch: an input of it.
    """
    candidates = [
        group for group in (*_readers(model, batch), *_pairs(model)) if _is_free(model, group)
    ]
    expected = _outputs(model, batch)

    def holding(groups: Sequence[Group]) -> list[Group]:
        if not groups or _keeps(model, groups, batch, expected):
            return list(groups)
        if len(groups) == 1:
            return []
        half = len(groups) // 2
        return holding(groups[:half]) + holding(groups[half:])

    return holding([group for group in candidates if _folds(model, group)])


@contextlib.contextmanager
def scaled(
    model: nn.Module,
    rules: Mapping[str, Rule],
    batches: Sequence[Any],
    keep: bool,
) -> Iterator[Mapping[str, str | None]]:
    """Finds and folds scales; the body gets the names of their linears, with why one has none after all.

    Args:
        model: dense.
        rules: by names of linears, with a method of `SCALINGS`; if there are none nothing is done.
        batches: inputs of the model.
        keep: whether the weights get their values back if the body raises; they are in memory twice then.

    Raises:
        ValueError: no scales of any of the linears can be folded; or the model gives no tensor.
    """
    if not rules:
        yield {}
        return
    groups = [
        group
        for group in find_groups(model, batches[0])
        if not rules.keys().isdisjoint(group.linears)
    ]
    if not groups:
        methods = " and ".join(sorted({repr(rule.method) for rule in rules.values()}))
        raise ValueError(
            f"method {methods}: no layer of the model takes the scales of the linears after it"
        )
    changed = {id(p): p for group in groups for p in _parameters(model, group)}
    done: dict[str, str | None] = {}
    with _restored(changed.values(), always=False) if keep else contextlib.nullcontext():

        def hessian(group: Group) -> tuple[int, int]:
            count = 1 if _rule(group, rules).method == "awq" else 0
            return count, _linear(model, group.linears[0]).in_features

        for chunk in parts(groups, hessian):
            first = [group.linears[0] for group in chunk]
            full = [
                name
                for name, g in zip(first, chunk, strict=True)
                if _rule(g, rules).method == "awq"
            ]
            statistics = calibrate(model, first, full, batches, lambda: None)
            for group, name in zip(chunk, first, strict=True):
                found = statistics.pop(name)
                done.update(dict.fromkeys(group.linears, found.missing))
                if found.missing is None:
                    _fold(model, group, rules, found)
        yield done


def _rule(group: Group, rules: Mapping[str, Rule]) -> Rule:
    return next(rules[name] for name in group.linears if name in rules)


@torch.no_grad()
def _fold(
    model: nn.Module, group: Group, rules: Mapping[str, Rule], statistics: InputStatistics
) -> None:
    linears = [_linear(model, name) for name in group.linears]
    rule = _rule(group, rules)
    weights = [_linear(model, name).weight for name in group.linears if name in rules]
    options: Any = SCALINGS[rule.method or ""] | dict(rule.options)
    assert rule.format is not None
    try:
        if rule.method == "awq":
            scales = awq_scales(
                statistics.absmean, statistics.relative_hessian, weights, rule.format, **options
            )
        else:
            scales = smooth_scales(statistics.absmax, weights, **options)
        fold(model.get_submodule(group.previous), linears, scales)
    except (TypeError, ValueError) as e:
        raise type(e)(f"{group.linears[0]}: {e}") from e


def _readers(model: nn.Module, batch: Any) -> list[Group]:
    """Norms with the linears whose input is their output."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, dict[str, None]] = {}

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                # As long as it is held nothing else lies there.
                made[output.data_ptr()] = (name, output)

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            source = made.get(args[0].data_ptr()) if args and isinstance(args[0], Tensor) else None
            if source is not None:
                found.setdefault(source[0], {})[name] = None

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
            elif weight is not None and weight.dim() == 1:
                stack.callback(module.register_forward_hook(after(name)).remove)
        stack.enter_context(evaluating(model))
        forward(model, batch)
    return [Group(previous, tuple(linears)) for previous, linears in found.items()]


def _pairs(model: nn.Module) -> Iterator[Group]:
    for name, parent in model.named_modules():
        for above, below in _PAIRS:
            one, other = getattr(parent, above, None), getattr(parent, below, None)
            if isinstance(one, nn.Linear) and isinstance(other, nn.Linear):
                prefix = f"{name}." if name else ""
                yield Group(prefix + above, (prefix + below,))


def _is_free(model: nn.Module, group: Group) -> bool:
    """Whether no other module has one of the weights."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    return all(owners[id(p)] == 1 for p in _parameters(model, group))


def _folds(model: nn.Module, group: Group) -> bool:
    """Whether `fold` takes the layers, whatever lies between them."""
    linears = [_linear(model, name) for name in group.linears]
    with _restored(_parameters(model, group)):
        try:
            fold(model.get_submodule(group.previous), linears, _powers(linears[0]))
        except (TypeError, ValueError):
            return False  # the layer stays as it is, which its row in the report says
    return True


def _keeps(
    model: nn.Module, groups: Sequence[Group], batch: Any, expected: Sequence[Tensor]
) -> bool:
    """Whether the outputs stay as they are with these groups folded."""
    changed = {id(p): p for group in groups for p in _parameters(model, group)}
    with _restored(changed.values()):
        for group in groups:
            linears = [_linear(model, name) for name in group.linears]
            fold(model.get_submodule(group.previous), linears, _powers(linears[0]))
        found = _outputs(model, batch)
    # Kernels may sum in another order at another time.
    return all(
        float((a - b).norm()) <= 1e-6 * float(b.norm())
        for a, b in zip(found, expected, strict=True)
    )


def _powers(linear: nn.Linear) -> Tensor:
    """Factors that round nothing, 1/2 and 2 by turns of 1 and of 3."""
    k = torch.arange(linear.in_features, dtype=torch.float32, device=linear.weight.device)
    return torch.where((k % 4 == 0) | (k % 7 == 3), 2.0, 0.5)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All floating tensors that the model gives, in fp64."""
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.double())
        elif isinstance(value, Mapping):
            for part in value.values():
                walk(part)
        elif isinstance(value, (tuple, list)):
            for part in value:
                walk(part)

    with torch.no_grad(), evaluating(model):
        walk(forward(model, batch))
    if not found:
        raise ValueError("the model gives no floating tensor: scales cannot be checked")
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _parameters(model: nn.Module, group: Group) -> list[Tensor]:
    """What folding changes."""
    previous = model.get_submodule(group.previous)
    found = [*previous.parameters(recurse=False)]
    return [*found, *(_linear(model, name).weight for name in group.linears)]


@contextlib.contextmanager
def _restored(tensors: Collection[Tensor], always: bool = True) -> Iterator[None]:
    """Tensors get their values back at the end, or only if the body raises."""
    before = [(t, t.detach().clone()) for t in tensors]

    def restore() -> None:
        with torch.no_grad():
            for t, values in before:
                t.copy_(values)

    try:
        yield
    except BaseException:
        restore()
        raise
    if always:
        restore()


def note_unscaled(
    report: Report, rules: Mapping[str, Rule], folded: Mapping[str, str | None]
) -> None:
    """Notes which of the layers have no scales, though their rules want some."""
    for i, row in enumerate(report.layers):
        why = folded.get(row.name, "no layer before it takes scales")
        if row.name in rules and why is not None and row.note is None:
            note = f"{why}: quantized without {rules[row.name].method!r}"
            report.layers[i] = replace(row, note=note)


def base_rule(rule: Rule) -> Rule:
    """What quantizes the weight once the scales are folded: the default method of the format."""
    return replace(rule, method=None, options={}) if rule.method in SCALINGS else rule
