"""Whether a checkpoint fits a model, found out before the model is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.files import cut, shown
from lowbit.formats import Format
from lowbit.io import extra_state
from lowbit.io.native import prefix_of
from lowbit.io.readers.native import NativeReader
from lowbit.nn import PackedModule
from lowbit.nn.conv import CONVOLUTIONS, matrix_of
from lowbit.nn.product import PackedProduct
from lowbit.nn.surgery import obstacle

# What packed modules take the place of, and what may have a static scale of activations.
DENSE_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
_WITH_SCALES: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, PackedProduct)
_SHOWN = 20  # differences in an error message


def own_state(module: nn.Module, prefix: str) -> dict[str, Any]:
    """What a module puts into a state dict besides its children and a quantized weight: tensors, and an
    extra state of any kind. Hooks of state dicts are not called.
    """
    if isinstance(module, PackedModule):
        return {prefix + name: t for name, t in module.other_tensors().items()}
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, prefix, keep_vars=True)
    return state


class Match:
    """How the names of a checkpoint and of a model correspond.

    Attributes:
        modules: every module by every name it has.
        tied: layer -> the stored layer whose weight it shares, by the header or because the model
            shares it.
        wanted: the model's tensors that are dense in the checkpoint.
        extra: the names of the extra states that the model takes; what they hold is the module's affair.
    """

    def __init__(self, model: nn.Module, checkpoint: NativeReader) -> None:
        """Raises ValueError, listing every difference, if the checkpoint does not fit the model."""
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._checkpoint = checkpoint
        header = checkpoint.header
        dense_ties = {name for name, first in header.tied.items() if first in checkpoint.dense}
        self._available = (checkpoint.dense.keys() | dense_ties) - checkpoint.inner
        self.tied = {name: first for name, first in header.tied.items() if first in header.layers}
        self.tied.update(self._shared_in_model())
        problems = [
            problem
            for name, first in {
                **dict(zip(header.layers, header.layers, strict=True)),
                **self.tied,
            }.items()
            if (problem := self._layer_problem(name, *header.layers[first]))
        ]
        self.wanted: dict[str, Any] = {}
        self.extra: set[str] = set()
        for name, module in self.modules.items():
            own = own_state(module, prefix_of(name))
            if not isinstance(module, PackedModule) and extra_state.KEY not in module._buffers:
                # As torch: a module that only gives an extra state takes none.
                key = prefix_of(name) + extra_state.KEY
                own.pop(key, None)
                if type(module).set_extra_state is not nn.Module.set_extra_state:
                    self.extra.add(key)
            if name in header.layers or name in self.tied:
                own.pop(f"{prefix_of(name)}weight", None)
                static = f"{prefix_of(name)}input_scale"
                if static in self._available and isinstance(module, _WITH_SCALES):
                    # Loading makes it where the model has none.
                    own.setdefault(static, torch.empty((), dtype=torch.float32, device="cpu"))
                order = f"{prefix_of(name)}input_order"
                if order in self._available and isinstance(module, nn.Linear):
                    columns = module.in_features
                    own.setdefault(order, torch.empty(columns, dtype=torch.int64, device="cpu"))
            elif isinstance(module, PackedModule):
                problems.append(
                    f"layer {shown(name)} is {module.format.name} in the model and not in the file"
                )
            self.wanted.update(own)
        problems += self._dense_problems()
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            listed = "; ".join(problems[:_SHOWN])
            raise ValueError(f"{checkpoint.path} does not fit the model: {listed}{more}")

    def _shared_in_model(self) -> dict[str, str]:
        """Layers without tensors in the file that share, in the model, the weight of a stored
        layer.
        """
        layers = self._checkpoint.header.layers
        stored = {_identity(self.modules[name]): name for name in layers if name in self.modules}
        return {
            name: stored[_identity(module)]
            for name, module in self.modules.items()
            if isinstance(module, (*DENSE_KINDS, PackedModule))
            and _identity(module) in stored
            and name not in layers
            and name not in self.tied
            and f"{name}.weight" not in self._available
        }

    def _layer_problem(self, name: str, format: Format, shape: tuple[int, int]) -> str | None:
        module = self.modules.get(name)
        if module is None:
            return f"layer {shown(name)} is not a module of the model"
        if isinstance(module, PackedModule):
            if (module.format, module.shape) == (format, shape):
                return None
            return (
                f"layer {shown(name)} is {module.format.name} {module.shape} in the model, "
                f"{format.name} {shape} in the file"
            )
        if not isinstance(module, DENSE_KINDS):
            kind = type(module).__name__
            return f"layer {shown(name)} is a {kind}, not an nn.Linear, nn.Embedding or convolution"
        if not name:
            return f"the model is itself the layer, a {type(module).__name__}: put it in a module"
        if reason := obstacle(module):
            return f"layer {name!r} cannot be replaced: {reason}"
        own = tuple(matrix_of(module).shape)
        if own != shape:
            return f"layer {shown(name)} has shape {own} in the model, {shape} in the file"
        return None

    def _dense_problems(self) -> Iterable[str]:
        given = {id(t) for name, t in self.wanted.items() if name in self._available}
        for name, t in self.wanted.items():
            if name in self._available:
                shape = self._checkpoint.dense[self._checkpoint.header.tied.get(name, name)][0]
                if not isinstance(t, Tensor) or tuple(t.shape) != shape:
                    model_shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                    yield f"{cut(name)} has shape {model_shape} in the model, {shape} in the file"
            elif id(t) not in given:
                yield f"{cut(name)} is missing in the file"
        stored = self._available | self._checkpoint.header.extra.keys()
        for name in sorted(self.extra - stored):
            yield f"{cut(name)} is missing in the file"
        for name in sorted(stored - self.wanted.keys() - self.extra):
            yield f"{cut(name)} is not part of the model"

    def restore_sharing(self, model: nn.Module) -> None:
        """Makes the parameters that were one object one again, after a load that replaced them."""
        names: dict[int, list[str]] = {}
        for name, t in self.wanted.items():
            names.setdefault(id(t), []).append(name)
        for group in names.values():
            # A name that the file has comes first: the others may hold nothing yet.
            first, *others = sorted(group, key=lambda name: name not in self._available)
            parent, _, key = first.rpartition(".")
            loaded = getattr(model.get_submodule(parent), key) if others else None
            for other in others:
                parent, _, key = other.rpartition(".")
                setattr(model.get_submodule(parent), key, loaded)


def _identity(module: nn.Module) -> int:
    """Equal for modules that share a weight."""
    return id(
        module._buffers if isinstance(module, PackedModule) else getattr(module, "weight", module)
    )
