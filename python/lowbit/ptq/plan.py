"""The plan of quantizing a model: which layers are replaced, and why every other matrix stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lowbit.nn import PackedModule
from lowbit.nn.conv import CONVOLUTIONS
from lowbit.nn.embedding import scale_of
from lowbit.nn.names import Rule, Selection
from lowbit.nn.stand_ins import is_linear
from lowbit.nn.surgery import obstacle
from lowbit.ptq.report import Report
from lowbit.weights.quantized import TENSOR_NAMES

# They hand the weights of their children to fused kernels of torch without calling the children.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
Names = tuple[str, ...]  # of one module


def plan_layers(
    model: nn.Module, selection: Selection, report: Report, stacklevel: int = 2
) -> dict[Names, tuple[Rule, int]]:
    """Every name of each module to replace, with its rule and the identity of its weight.

    What is left is noted in the report, and there is a warning if it is much and nobody asked for
    it, and one of patterns that match nothing. The plan must not keep the modules alive.

    Raises:
        ValueError: the model is a layer to replace itself, or a parameter has no shape yet.
    """
    selection.warn_unmatched(names_in(model), stacklevel + 1)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    fused: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        if isinstance(module, READS_WEIGHTS):
            fused.update(id(child) for child in module.children())
    plan: dict[Names, tuple[Rule, int]] = {}
    planned: dict[int, int] = {}
    counted: set[int] = set()
    for key, module in modules.items():
        name = names[key][0]
        if isinstance(module, PackedModule):
            report.leave(name, f"already quantized to {module.format.name}", asked=True)
            codes = id(module._buffers["codes"])
            report.packed_before += 0 if codes in counted else module.shape[0] * module.shape[1]
            counted.add(codes)
        left: dict[_Reason, dict[str, Tensor]] = {}
        for own, parameter in _matrices(name, module):
            reason = _reason(model, module, name, own, selection, key in fused)
            if reason is not None:
                left.setdefault(reason, {})[own] = parameter
            elif not name:
                raise ValueError(
                    "model must contain the layers to replace, it is one itself "
                    f"({type(module).__name__}): use QuantLinear.from_linear or "
                    "QuantEmbedding.from_embedding"
                )
            else:
                plan[tuple(names[key])] = (selection.rule(name), id(parameter))
                planned[id(parameter)] = parameter.numel()
        for reason, parameters in left.items():
            sizes = {}
            for own, parameter in parameters.items():
                size = 0 if id(parameter) in counted else parameter.numel()
                sizes[f"{name}.{own}".lstrip(".")] = size
                counted.add(id(parameter))
            why = reason.why
            if [*parameters] != ["weight"]:
                why += f": {', '.join(parameters)}"
            report.leave(reason.module, why, sizes, reason.asked)
    report.warn_unasked(sum(planned.values()), stacklevel + 1)
    return plan


def names_in(model: nn.Module) -> list[str]:
    """What a pattern can mean in a model: modules, and parameters that are not the `weight` of one."""
    named = list(model.named_modules(remove_duplicate=False))
    every = ((name, own) for name, module in named for own, _ in _matrices(name, module))
    return [n for n, _ in named] + [f"{n}.{own}".lstrip(".") for n, own in every if own != "weight"]


@dataclass(frozen=True)
class _Reason:
    """Why a parameter stays, the module that it belongs to, and whether the user asked for it."""

    module: str
    why: str
    asked: bool = False


def _matrices(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters of two or more dimensions, but for those of a packed weight."""
    for own, parameter in module._parameters.items():
        if parameter is not None and is_lazy(parameter):
            raise ValueError(f"{name}.{own} has no shape yet: run the model once before")
        packed = isinstance(module, PackedModule) and own in TENSOR_NAMES
        if parameter is not None and parameter.dim() > 1 and not packed:
            yield own, parameter


def _reason(
    model: nn.Module, module: nn.Module, name: str, own: str, selection: Selection, fused: bool
) -> _Reason | None:
    """Why a parameter cannot be replaced, or None."""
    named = name if own == "weight" else f"{name}.{own}".lstrip(".")
    if isinstance(module, ParametrizationList):
        # The module whose weight it makes is the one that patterns mean.
        named = name = name.rpartition(".parametrizations.")[0]
        module = model.get_submodule(name)
    if selection.skipped(named):
        return _Reason(name, "skipped", asked=True)
    if isinstance(module, nn.Embedding) and not selection.by_name:
        return _Reason(name, "an embedding is quantized only if a recipe names it", asked=True)
    out = selection.rule(named).format is None
    why = _obstacle(module, own, fused) or ("not in the recipe" if out else None)
    return None if why is None else _Reason(name, why, asked=out)


def _obstacle(module: nn.Module, own: str, fused: bool) -> str | None:
    """Why a module cannot be replaced, whatever the recipe says."""
    kind = type(module)
    kinds = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
    base = next((base for base in kinds if isinstance(module, base)), None)
    if base is None and is_linear(module):
        return obstacle(module)
    if base is None:
        return f"{kind.__name__} has no quantized form"
    scaled = isinstance(module, nn.Embedding) and scale_of(module) is not None
    if kind.forward is not base.forward and not scaled:  # type: ignore[attr-defined]
        return f"{kind.__name__} has a forward of its own"
    if fused:
        return f"the parent of this {kind.__name__} reads its weight directly"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes the weight in forward"
    return obstacle(module) or (None if own == "weight" else "only the weight is quantized")
