"""Siblings: linears that a model calls one after another with the same x, computed in one call.

`fuse` finds q/k/v and gate/up projections. The first of them that is called computes all products,
and the others take theirs; modules, names, hooks and state dicts stay as they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit import layouts, ops

if TYPE_CHECKING:
    from lowbit.nn.linear import QuantLinear

_logger = logging.getLogger("lowbit")

# Names of the children that Llama-like and BERT-like modules call with the same x.
PATTERNS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
_GROUPS = "_lowbit_siblings"


class Siblings:
    """Products of several QuantLinear with one x.

    A product that is handed out belongs to the same tensor object x, unchanged (its version
    counter), to the same weights, unchanged, to the same autocast, and to the calling thread.
    Otherwise a layer computes its own: also if a gradient is needed, under torch.compile, for
    tensor subclasses, and for inference tensors, which have no version counter. Once a product is
    not asked for (a layer was replaced, or is given another x), the group dissolves itself.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.__setstate__(list(layers))

    def __getstate__(self) -> list[QuantLinear]:
        return self.layers

    def __setstate__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self._pending = threading.local()
        for layer in layers:
            layer._siblings = self

    def dissolve(self) -> None:
        """Lets every layer compute its own product from now on."""
        for layer in self.layers:
            layer._siblings = None
        self.layers = []

    def product(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """x W^T + bias of `layer`, or None if it has to compute it itself."""
        if type(x) is not Tensor or x.is_inference():
            return None
        call = (x._version, x.data_ptr(), x.requires_grad, *_modes())
        pending: _Pending | None = getattr(self._pending, "value", None)
        if pending is not None and pending.x is x and pending.call == call:
            result = pending.results.pop(id(layer), None)
            if not pending.results:
                self._pending.value = None
            return result[1] if result is not None and result[0] == _state(layer) else None
        if pending is not None:
            self._pending.value = None
            _logger.info("%r is not called with the x of its siblings: not fused", layer)
            self.dissolve()
            return None
        return self._compute(layer, x, call)

    def _compute(self, layer: QuantLinear, x: Tensor, call: tuple[Any, ...]) -> Tensor | None:
        layers = self.layers
        buffers = [each._buffers for each in layers]
        device = buffers[0]["codes"].device
        if any(each._trained for each in layers) or any(
            b["codes"].device != device for b in buffers
        ):
            return None
        biases = [each._parameters["bias"] for each in layers]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *biases)):
            return None
        ys = ops.linear_many_op(
            ops.autocast(x),
            [b["codes"] for b in buffers],
            [b["scales"] for b in buffers],
            [b["zeros"] for b in buffers],
            [b["table"] for b in buffers],
            biases,
            [each._spec for each in layers],
            layouts.kernel_layout(device),
            [each.shape[0] for each in layers],
            layer.shape[1],
        )
        results = {id(each): (_state(each), y) for each, y in zip(layers, ys, strict=True)}
        own: Tensor = results.pop(id(layer))[1]
        self._pending.value = _Pending(x, call, results)
        return own


class _Pending:
    """Products of one x that were not asked for yet, with the state of the weights they used."""

    __slots__ = ("call", "results", "x")

    def __init__(
        self, x: Tensor, call: tuple[Any, ...], results: dict[int, tuple[Any, Tensor]]
    ) -> None:
        self.x, self.call, self.results = x, call, results


def _modes() -> tuple[Any, ...]:
    autocast = torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled(), autocast, torch.get_autocast_dtype("cpu") if autocast else None


def _state(layer: QuantLinear) -> list[tuple[Any, ...]]:
    """What a change of the weights changes: which tensors they are, their versions and places."""
    b = layer._buffers
    tensors = [b.get(name) for name in ("codes", "scales", "zeros", "table")]
    return [
        (id(t), 0 if t.is_inference() else t._version, t.data_ptr(), t.requires_grad)
        for t in (*tensors, layer._parameters["bias"])
        if t is not None
    ]


def fuse(model: nn.Module) -> int:
    """Lets the q/k/v and gate/up projections of a model compute their products together.

    Results are bit for bit those of separate calls. A module qualifies if it has children of these
    names that are QuantLinear with the same number of input features; one that is fused already
    stays so. What the fused layers require of x: `Siblings`. deepcopy and pickle of the modules
    around them keep them fused, those of a single layer do not.

    Returns:
        The number of groups made.
    """
    from lowbit.nn.linear import QuantLinear

    made = 0
    for module in model.modules():
        for names in PATTERNS:
            layers = [module._modules.get(name) for name in names]
            if (
                all(type(layer) is QuantLinear and layer._siblings is None for layer in layers)
                and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
                and len({id(layer) for layer in layers}) == len(layers)
            ):
                groups = module.__dict__.setdefault(_GROUPS, [])
                groups.append(Siblings(layers))  # type: ignore[arg-type]
                made += 1
    return made


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`."""
    for module in model.modules():
        for group in module.__dict__.pop(_GROUPS, ()):
            group.dissolve()
