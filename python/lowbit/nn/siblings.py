"""Siblings: linears that a model calls one after another with the same x, computed in one call.

`fuse` finds q/k/v and gate/up projections. The first of them that is called computes all products,
and the others take theirs; modules, names, hooks and state dicts stay as they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import layouts, modes
from lowbit.nn.linear import QuantLinear
from lowbit.nn.states import same_bits
from lowbit.ops.linear import autocast
from lowbit.ops.many import arguments_of, groups, linear_siblings

_logger = logging.getLogger("lowbit")

# Names of the children that Llama-like and BERT-like modules call with the same x.
PATTERNS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
_GROUPS = "_lowbit_siblings"
# Numbers that a group keeps between calls: x, and the other layers' products, scales and tables.
_MAX_KEPT = 1 << 18


class Siblings:
    """Products of several QuantLinear with one x, on the CPU.

    A product that is handed out is that of the numbers that x, scales, zeros, table and bias hold at
    that moment: copies of them are kept beside it and compared bit for bit, so that writes which no
    version counter sees (`x.data`, numpy) count, too. Of the codes, which are large, it is the tensor
    and its version counter. A layer computes its own product where something differs, a gradient is
    needed, or what is kept would be large; also under torch.compile, in transforms of torch.func, and for tensor
    subclasses. Once a product is not asked for (a layer was replaced, or is given another x), the
    group dissolves itself.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.__setstate__(list(layers))

    def __getstate__(self) -> list[QuantLinear]:
        return self.layers

    def __setstate__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self._pending = threading.local()
        groups[id(self)] = self
        for layer in layers:
            layer._siblings = self

    def dissolve(self) -> None:
        """Lets every layer compute its own product from now on."""
        for layer in self.layers:
            layer._siblings = None
        self.layers, self._pending = [], threading.local()

    def product(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """x W^T + bias of `layer`, or None if it has to compute it itself."""
        if type(x) is not Tensor or not x.is_cpu:
            return None
        if modes.active():
            return None
        setting = (x.requires_grad, *_modes())
        pending: _Pending | None = getattr(self._pending, "value", None)
        if pending is None:
            return self._compute(layer, x, setting)
        if pending.modes == setting and same_bits(pending.x, x):
            result = pending.results.pop(id(layer), None)
            if not pending.results:
                self._pending.value = None
            return result[1] if result is not None and result[0].holds(layer) else None
        self._pending.value = None
        _logger.info("%r is not called with the x of its siblings: not fused", layer)
        self.dissolve()
        return None

    def arguments(self) -> tuple[Any, ...]:
        """What lowbit::linear_many takes after x."""
        weights = [each._terms(each._buffers)[0] for each in self.layers]
        return arguments_of(weights, [each._parameters["bias"] for each in self.layers])

    def _compute(self, layer: QuantLinear, x: Tensor, modes: tuple[Any, ...]) -> Tensor | None:
        grad = torch.is_grad_enabled()
        others = [each for each in self.layers if each is not layer]
        for each in self.layers:
            bias = each._parameters["bias"]
            if each._trained or (grad and bias is not None and bias.requires_grad):
                return None
            codes = each._buffers["codes"]
            if codes.device != x.device or codes.is_inference():  # which has no version counter
                return None
        if (grad and x.requires_grad) or torch.jit.is_tracing():
            return None
        rows = x.numel() // max(1, layer.in_features)
        kept = x.numel() + sum(rows * each.out_features + _numel(each) for each in others)
        if kept > _MAX_KEPT:
            return None
        ys = linear_siblings(autocast(x), id(self))
        products = {id(each): y for each, y in zip(self.layers, ys, strict=True)}
        results = {id(each): (_Weight(each), products[id(each)]) for each in others}
        self._pending.value = _Pending(x.detach().clone(), modes, results)
        return products[id(layer)]


class _Weight:
    """What the product of a layer was computed with."""

    __slots__ = ("_codes", "_copies", "_version")

    def __init__(self, layer: QuantLinear) -> None:
        self._codes = layer._buffers["codes"]
        self._version = self._codes._version
        self._copies = [None if t is None else t.detach().clone() for t in _small(layer)]

    def holds(self, layer: QuantLinear) -> bool:
        """Whether the layer would compute the same."""
        return (
            layer._buffers["codes"] is self._codes
            and self._codes._version == self._version
            and all(same_bits(a, b) for a, b in zip(self._copies, _small(layer), strict=True))
        )


class _Pending:
    """Products that were not asked for yet, with the x and the weights that they are of."""

    __slots__ = ("modes", "results", "x")

    def __init__(
        self, x: Tensor, modes: tuple[Any, ...], results: dict[int, tuple[_Weight, Tensor]]
    ) -> None:
        self.x, self.modes, self.results = x, modes, results


def _modes() -> tuple[Any, ...]:
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype


def _small(layer: QuantLinear) -> tuple[Tensor | None, ...]:
    b = layer._buffers
    return b["scales"], b["zeros"], b["table"], layer._parameters["bias"]


def _numel(layer: QuantLinear) -> int:
    return sum(t.numel() for t in _small(layer) if t is not None)


def fuse(model: nn.Module) -> int:
    """Lets the q/k/v and gate/up projections of a model compute their products together.

    Results are bit for bit those of separate calls. It saves parallel regions on the CPU: worth trying where several
    threads run small layers on few rows. One thread gains nothing. A module qualifies if it has children of these
    names that are QuantLinear with the same number of input features and without other terms; one that is fused already
    stays so. When a layer computes its own product all the same: `Siblings`. deepcopy and pickle of the modules around
    them keep them fused, those of a single layer do not.

    Returns:
        The number of groups made.
    """
    made: list[tuple[nn.Module, Siblings]] = []
    try:
        _fuse(model, made)
    except BaseException:
        for module, group in made:
            group.dissolve()
            module.__dict__[_GROUPS].remove(group)
            if not module.__dict__[_GROUPS]:
                del module.__dict__[_GROUPS]
        raise
    return len(made)


def _fuse(model: nn.Module, made: list[tuple[nn.Module, Siblings]]) -> None:
    for module in model.modules():
        for names in PATTERNS:
            layers = [module._modules.get(name) for name in names]
            if (
                all(type(layer) is QuantLinear and layer._siblings is None for layer in layers)
                and all(layer.input_scale is layer.split is None for layer in layers)  # type: ignore[union-attr]
                and not any(layer.format.more_terms for layer in layers)  # type: ignore[union-attr]
                and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
                and len({id(layer) for layer in layers}) == len(layers)
                and len({layouts.fitting(layer.format) for layer in layers}) == 1  # type: ignore[union-attr, arg-type]
            ):
                group = Siblings(layers)  # type: ignore[arg-type]
                module.__dict__.setdefault(_GROUPS, []).append(group)
                made.append((module, group))


def groups_of(model: nn.Module) -> list[Siblings]:
    """What `fuse` has made in a model."""
    return [group for module in model.modules() for group in vars(module).get(_GROUPS, ())]


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`."""
    for module in model.modules():
        for group in module.__dict__.pop(_GROUPS, ()):
            group.dissolve()
