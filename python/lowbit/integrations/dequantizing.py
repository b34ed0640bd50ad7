"""dequantize_model: dense modules in the place of packed ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from lowbit.integrations.dense import dense_of
from lowbit.nn import (
    PackedModule,
    QuantConv,
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    unfuse,
)
from lowbit.nn.stand_ins import join_dense
from lowbit.nn.surgery import replace
from lowbit.nn.undo import as_it_was


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Puts a dense module with the values that a packed one stands for in the place of each, in place.

    What shares a weight still does. A model of transformers or diffusers, also one within another module, says that it
    is dense again, as its own `dequantize()` lets it. If anything is raised, all is as it was.

    Args:
        model: with packed layers, or without.
        dtype: of the dense weights; None is what each packed layer stands for.

    Returns:
        The names of the layers that were packed.

    Raises:
        ValueError: the model itself is a packed layer (`QuantLinear.to_linear` makes the dense one).
        NotImplementedError: a packed layer has no dense form, or is spread over processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> report = lowbit.quantize_model(model, "nf4")
        >>> lowbit.dequantize_model(model)
        ['0']
    """
    if isinstance(model, PackedModule):
        raise ValueError(
            f"model is a {type(model).__name__} itself: its to_linear, to_embedding or to_conv makes the dense module"
        )
    owners = _owners(model, "")
    inside = tuple(f"{name}." for name in owners if name)
    names = packed_names(model)
    rest = [] if "" in owners else [name for name in names if not name.startswith(inside)]
    for name in rest:
        _check(name, model.get_submodule(name))
    with as_it_was(model):
        for owner in owners.values():
            owner.hf_quantizer.make_dense(owner, dtype)
        put_dense(model, rest, dtype)
    return names


def packed_names(model: nn.Module) -> list[str]:
    """The names of packed layers, and of experts that are such layers."""
    kinds = PackedModule | QuantExperts
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def put_dense(model: nn.Module, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
    """Puts dense modules in the place of packed ones by their names; what shares a weight still does.

    Raises:
        NotImplementedError: one has no dense form. Nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = [(name, modules[name]) for name in names]
    for name, module in chosen:
        _check(name, module)
    if chosen:
        unfuse(model)
    weights: dict[int, nn.Parameter] = {}
    for _, module in chosen:
        dense: Any = dense_of(cast("PackedModule", module), dtype)
        dense.weight = weights.setdefault(id(module._buffers), dense.weight)
        every = [other for other, m in modules.items() if m is module]
        replace(model, every, dense, own=_own_names(module))
    join_dense(model)


def _check(name: str, module: nn.Module) -> None:
    if not isinstance(module, QuantLinear | QuantEmbedding | QuantConv):
        raise NotImplementedError(f"{name} is a {type(module).__name__}, which has no dense form")
    if module.split is not None:
        raise NotImplementedError(f"{name} cannot be made dense: {module.split}")


def _own_names(module: Any) -> set[str]:
    """What a packed layer has of itself, and nobody attached to it."""
    if isinstance(module, QuantConv):
        blank: Any = module.blank()
    else:
        blank = type(module).from_quant_tensor(module.quant_tensor().to("meta"))
    return {*vars(blank), *blank._buffers, *blank._parameters, "_siblings", "_tied"}


def _owners(module: nn.Module, name: str) -> dict[str, Any]:
    """The outermost models of a library that know that lowbit quantized them, by their names."""
    if hasattr(getattr(module, "hf_quantizer", None), "make_dense"):
        return {name: module}
    found: dict[str, Any] = {}
    for child, inner in module.named_children():
        found |= _owners(inner, f"{name}.{child}".lstrip("."))
    return found
