"""Linears in the place of what computes one under another name: GPT-2's Conv1D, FalconLinear, fused experts, halves.

What quantizes a model, and what fills one from a checkpoint, knows nn.Linear alone. Within `stand_ins` every such
module or parameter is one, of the same memory; what is still dense at the end is again what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowbit.nn.experts import (
    HALVES,
    ExpertLinear,
    QuantExperts,
    fuse,
    held,
    projections,
    rows_of_halves,
    split,
)
from lowbit.nn.joined import JoinedLinear, halved, settle, whole
from lowbit.nn.joined import rows_of_halves as rows_of_linear
from lowbit.nn.surgery import obstacle, put_back, replace

# Classes of transformers by their names, and whether they hold the weight transposed. They need not be imported.
_LINEARS = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
_OWN = ("nf", "nx")  # attributes of a Conv1D that say its shape


class Form(NamedTuple):
    """How a model stores the weight (N, K) of a linear.

    Attributes:
        transposed: as (K, N).
        expert: its index in a parameter of several, or None.
        rows: which ones it is of those of an expert.
    """

    transposed: bool
    expert: int | None = None
    rows: slice = slice(None)

    def linear(self, stored: Tensor) -> Tensor:
        """(N, K), a view of what is stored."""
        rows = stored if self.expert is None else stored[self.expert]
        return (rows.t() if self.transposed else rows)[self.rows]


class StandIn(nn.Linear):
    """An nn.Linear with the weight of another module.

    Attributes:
        stands_for: (module, its weight as this one has it).
    """

    not_carried = ("stands_for",)

    def __init__(self, module: Any) -> None:
        weight = module.weight.detach()
        weight = weight.t() if is_transposed(module) else weight
        n, k = weight.shape
        super().__init__(k, n, False, device="meta", dtype=weight.dtype)
        learns = module.weight.requires_grad
        self.weight = nn.Parameter(weight, learns) if is_transposed(module) else module.weight
        self.bias = module.bias
        vars(self)["stands_for"] = module, self.weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear under another name, of which a `StandIn` can be made."""
    return _name(module) in _LINEARS


def is_transposed(module: nn.Module) -> bool:
    """Whether such a module holds the weight as (K, N)."""
    return _LINEARS.get(_name(module), False)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@contextlib.contextmanager
def stand_ins(
    model: nn.Module, layers: Iterable[str] | None = None, apart: Collection[str] = ()
) -> Iterator[dict[str, Form]]:
    """Within the block every module that computes a linear under another name is an nn.Linear of the same weight.

    What is quantized within the block stays; the rest is what it was.

    Args:
        model: any.
        layers: those of a checkpoint, for which alone there are stand-ins; None for all.
        apart: modules of experts, whose gates shall be apart from what they multiply, and linears whose halves shall
            be, as those of `layers` may be.

    Yields:
        The form of those whose weight is stored in another one: transposed, or as a part of a parameter.
    """
    made = put_stand_ins(model, layers, apart)
    try:
        yield made
    finally:
        take_away(model)


def put_stand_ins(
    model: nn.Module, layers: Iterable[str] | None = None, apart: Collection[str] = ()
) -> dict[str, Form]:
    """As `stand_ins`, for good: `take_away` ends it."""
    wanted = None if layers is None else set(layers)
    fused = None if wanted is None else {name.rpartition(".")[0] for name in wanted}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    changed: dict[str, Form] = {}
    for module, own in names.items():
        is_apart = not set(apart).isdisjoint(own)
        changed.update(_split(module, own, fused, is_apart))
        if is_apart or (fused is not None and not fused.isdisjoint(own)):
            changed.update(_halve(model, module, own))
        is_wanted = wanted is None or not wanted.isdisjoint(own)
        if is_wanted and "" not in own and is_linear(module) and obstacle(module) is None:
            replace(model, own, StandIn(module), own=_OWN)
            if is_transposed(module):
                changed.update(dict.fromkeys(own, Form(True)))
    return changed


def _split(module: Any, own: list[str], wanted: set[str] | None, apart: bool) -> dict[str, Form]:
    """Splits the projections of a module of these names if one is wanted: all or none, as they compute together."""

    def paths(key: str) -> list[str]:
        return [f"{name}.{key}".lstrip(".") for name in own]

    keys = projections(module)
    apart |= wanted is not None and not wanted.isdisjoint(p for half in HALVES for p in paths(half))
    names = [n for key in keys for n in (HALVES if apart and key == "gate_up_proj" else (key,))]
    if wanted is not None and wanted.isdisjoint(path for name in names for path in paths(name)):
        return {}
    made = {}
    for key in keys:
        halves = apart and key == "gate_up_proj"
        for i, (name, experts) in enumerate(split(module, key, halves).items()):
            rows = rows_of_halves(module, 2 * experts.out_features)[i] if halves else slice(None)
            for path in paths(name):
                for e in range(len(experts)):
                    made[f"{path}.{e}"] = Form(bool(module.is_transposed), e, rows)
    return made


def _halve(model: nn.Module, module: nn.Module, own: list[str]) -> dict[str, Form]:
    """Takes the halves of a linear of these names apart."""
    if type(module) is not nn.Linear or "" in own or obstacle(module) is not None:
        return {}
    rows = rows_of_linear(module)
    if rows:
        replace(model, own, halved(module))
    return {f"{name}.{i}": Form(False, None, part) for name in own for i, part in enumerate(rows)}


def take_away(model: nn.Module) -> None:
    """Puts back what stand-ins that are still there stand for; weights that were set meanwhile stay."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, own in names.items():
        if isinstance(module, StandIn):
            put_back(model, own, _original(module))
        elif isinstance(module, JoinedLinear) and "stands_for" in vars(module):
            linear = whole(module)
            if linear is None:
                settle(module)
            else:
                put_back(model, own, linear)
        elif any(isinstance(child, QuantExperts) for child in module.children()):
            _settle(module)


def _original(stand_in: Any) -> nn.Module:
    module, weight = stand_in.stands_for
    if stand_in.weight is not weight:
        module.weight = _stored(module, stand_in.weight)
    module.bias = stand_in.bias
    module.training = stand_in.training
    return module  # type: ignore[no-any-return]


def _settle(module: nn.Module) -> None:
    """Experts of which none is packed are parameters again; of others the dense ones are linears of their own."""
    every = {k: child for k, child in module._modules.items() if isinstance(child, QuantExperts)}
    if all(isinstance(layer, ExpertLinear) for experts in every.values() for layer in experts):
        for key in held(module):
            fuse(module, key)
        return
    for experts in every.values():
        for e, layer in enumerate(experts):
            if isinstance(layer, ExpertLinear):
                experts[e] = _alone(layer)


def _alone(layer: ExpertLinear) -> nn.Linear:
    n, k = layer.weight.shape
    made = nn.Linear(k, n, False, device="meta", dtype=layer.weight.dtype)
    learns = layer.fused[0].requires_grad  # type: ignore[index]
    made.weight = nn.Parameter(layer.weight.detach().clone(), learns)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone(), learns)  # type: ignore[assignment]
    return made.train(layer.training)


def dense_forms(model: nn.Module, names: Collection[str], kinds: dict[str, nn.Module]) -> None:
    """Gives dense linears of a model the form that they have in its class: a Conv1D, or a part of a parameter.

    Args:
        model: whose packed layers have been made nn.Linear.
        names: of these.
        kinds: the modules of a new model of its class, by name.
    """
    for name in names:
        kind, linear = kinds.get(name), model.get_submodule(name)
        if kind is not None and is_linear(kind) and isinstance(linear, nn.Linear):
            _put(model, name, _as(kind, linear))
    join_dense(model)
    for module in list(model.modules()):
        every = {
            k: child for k, child in module._modules.items() if isinstance(child, QuantExperts)
        }
        if all(isinstance(layer, nn.Linear) for experts in every.values() for layer in experts):
            for key in held(module):
                fuse(module, key)


def join_dense(model: nn.Module) -> None:
    """Puts a linear in the place of halves that are both dense, with what is attached to them together."""
    names: dict[JoinedLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, JoinedLinear):
            names.setdefault(module, []).append(name)
    for joined, own in names.items():
        linear = whole(joined)
        if linear is not None and "" not in own:
            replace(model, own, linear, own=[*joined._modules])


def _as(kind: nn.Module, linear: nn.Linear) -> nn.Module:
    """The module `kind`, of another model on the meta device, with the values of a linear."""
    made: Any = kind
    made.weight, made.bias = _stored(kind, linear.weight), linear.bias
    return made.train(linear.training)  # type: ignore[no-any-return]


def _stored(module: nn.Module, weight: Any) -> nn.Parameter:
    """The weight (N, K) of a linear as a module under another name holds it."""
    if not is_transposed(module):
        return weight  # type: ignore[no-any-return]
    return nn.Parameter(weight.detach().t(), weight.requires_grad)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
