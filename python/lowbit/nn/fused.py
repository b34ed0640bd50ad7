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

from lowbit import fused, layouts, modes, ops

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
    Otherwise a layer computes its own: also if a gradient is needed, under torch.compile, inside
    transforms of torch.func, for tensor subclasses, and for inference tensors, which have no
    version counter. Once a product is not asked for (a layer was replaced, or is given another x),
    the group dissolves itself.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self.__setstate__(list(layers))

    def __getstate__(self) -> list[QuantLinear]:
        return self.layers

    def __setstate__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self._pending = threading.local()
        self._held: Sequence[tuple[Tensor, Tensor | None]] = ()
        self._arguments: tuple[Any, ...] = ()
        fused.groups[id(self)] = self
        for layer in layers:
            layer._siblings = self

    def dissolve(self) -> None:
        """Lets every layer compute its own product from now on."""
        for layer in self.layers:
            layer._siblings = None
        self.layers, self._held, self._arguments = [], (), ()

    def product(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """x W^T + bias of `layer`, or None if it has to compute it itself."""
        if type(x) is not Tensor or x.is_inference():
            return None
        pending: _Pending | None = getattr(self._pending, "value", None)
        if (pending is None or pending.x is not x) and modes.active():
            return None
        call = (x._version, x.data_ptr(), x.requires_grad, *_modes())
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

    def arguments(self) -> tuple[Any, ...]:
        """What lowbit::linear_many takes after x, made anew when a layer has other tensors."""
        held = [(each._buffers["codes"], each._parameters["bias"]) for each in self.layers]
        for (codes, bias), (old_codes, old_bias) in zip(held, self._held, strict=False):
            if codes is not old_codes or bias is not old_bias:
                break
        else:
            if self._held:
                return self._arguments
        self._held, self._arguments = held, self._make_arguments()
        return self._arguments

    def _make_arguments(self) -> tuple[Any, ...]:
        buffers = [each._buffers for each in self.layers]
        return (
            [b["codes"] for b in buffers],
            [b["scales"] for b in buffers],
            [b["zeros"] for b in buffers],
            [b["table"] for b in buffers],
            [each._parameters["bias"] for each in self.layers],
            [each._spec for each in self.layers],
            layouts.kernel_layout(buffers[0]["codes"].device, self.layers[0].format),
            [each.shape[0] for each in self.layers],
            self.layers[0].shape[1],
        )

    def _compute(self, layer: QuantLinear, x: Tensor, call: tuple[Any, ...]) -> Tensor | None:
        grad = torch.is_grad_enabled()
        for each in self.layers:
            bias = each._parameters["bias"]
            if each._trained or (grad and bias is not None and bias.requires_grad):
                return None
            if each._buffers["codes"].device != x.device:
                return None
        if (grad and x.requires_grad) or torch.jit.is_tracing():
            return None
        ys = ops.linear_siblings(ops.autocast(x), id(self))
        results = {id(each): (_state(each), y) for each, y in zip(self.layers, ys, strict=True)}
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
    dtype = torch.get_autocast_dtype("cpu") if autocast else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype


def _state(layer: QuantLinear) -> tuple[Any, ...]:
    """What loading, moving and training change. Only of the bias is a write in place noticed: the
    codebook's tensors belong to the layer.
    """
    bias = layer._parameters["bias"]
    if bias is None:
        return (id(layer._buffers["codes"]),)
    return (id(layer._buffers["codes"]), id(bias), 0 if bias.is_inference() else bias._version)


def fuse(model: nn.Module) -> int:
    """Lets the q/k/v and gate/up projections of a model compute their products together.

    Results are bit for bit those of separate calls. It saves parallel regions: worth trying where
    several threads run small layers. One thread gains nothing. A module qualifies if it has children of these
    names that are QuantLinear with the same number of input features and without outliers; one that is fused already
    stays so. What the fused layers require of x: `Siblings`. deepcopy and pickle of the modules
    around them keep them fused, those of a single layer do not.

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
    from lowbit.nn.linear import QuantLinear

    for module in model.modules():
        for names in PATTERNS:
            layers = [module._modules.get(name) for name in names]
            if (
                all(type(layer) is QuantLinear and layer._siblings is None for layer in layers)
                and all(layer.input_scale is None for layer in layers)  # type: ignore[union-attr]
                and not any(layer.format.outliers for layer in layers)  # type: ignore[union-attr]
                and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
                and len({id(layer) for layer in layers}) == len(layers)
                and len({layouts.fits_m16(layer.format) for layer in layers}) == 1  # type: ignore[union-attr, arg-type]
            ):
                group = Siblings(layers)  # type: ignore[arg-type]
                module.__dict__.setdefault(_GROUPS, []).append(group)
                made.append((module, group))


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`."""
    for module in model.modules():
        for group in module.__dict__.pop(_GROUPS, ()):
            group.dissolve()
