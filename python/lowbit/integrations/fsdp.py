"""Packed weights as parameters of bytes, which torch's `fully_shard` (FSDP2) shards as it does dense ones.

It leaves buffers whole on every rank. `shardable` puts the tensors of each packed weight into one uint8 Parameter,
without a gradient, that is gathered and freed with the others of its group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lowbit import layouts
from lowbit.backends import available
from lowbit.integrations.parts import whole
from lowbit.nn import (
    PackedModule,
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    ReorderedLinear,
    states,
    unfuse,
)
from lowbit.nn.embedding import ScaledQuantEmbedding
from lowbit.nn.split import BYTES
from lowbit.weights.quantized import QuantTensor, tensor_specs

_KINDS = (QuantLinear, ReorderedLinear, QuantEmbedding, ScaledQuantEmbedding)
_ALIGNMENT = 64  # of each tensor among the bytes

Model = TypeVar("Model", bound=nn.Module)


def shardable(model: Model) -> Model:
    """Makes the packed weights of a model parameters of bytes, in place; `fully_shard` of torch comes next.

    Products and gradients are what they were. State dicts hold the canonical tensors, as DTensors of rows once the
    model is sharded: `torch.distributed.checkpoint` writes them in parts and loads them for any number of ranks, also
    into a model that is not sharded. Making one gathers a weight at a time, so that all ranks must ask for it.

    Args:
        model: whole, on every rank alike. Projections that are fused (`lowbit.nn.fuse`) are apart from now on.

    Returns:
        The model.

    Raises:
        NotImplementedError: a packed module is of another kind than a linear, an embedding or a convolution. Nothing is
            changed then.
        ValueError: parts of a weight are learnable, or it is spread over ranks already. Nothing is changed then.

    Example:
        >>> model = shardable(lowbit.load_model("model.gguf"))  # doctest: +SKIP
        >>> for layer in model.model.layers:  # doctest: +SKIP
        ...     fully_shard(layer)
        >>> fully_shard(model)  # doctest: +SKIP
    """
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    for name, module in packed.items():
        if type(module) not in _KINDS and not isinstance(module, QuantConv):
            raise NotImplementedError(
                f"{name} is a {type(module).__name__}, which cannot be sharded"
            )
        if module.split is not None:
            raise ValueError(f"{name} is spread over ranks already: {module.split}")
        if learnable := module.learnable_parts():
            raise ValueError(f"{name} has learnable {learnable}: train_parameters(()) ends that")
    unfuse(model)
    made: dict[int, tuple[nn.Parameter, Bytes]] = {}
    for module in packed.values():
        key = id(module._buffers)  # one dict for all that share a weight
        if key not in made:
            split = Bytes(module._buffers)
            parameter = nn.Parameter(split.joined(module._buffers), requires_grad=False)
            made[key] = parameter, split
            empty = module.own_part().to("meta")
            module._set_operands(available.kernel_weight(empty))
        parameter, module.split = made[key]
        module.register_parameter(BYTES, parameter)
    return model


class Bytes:
    """Where the tensors of a weight lie in a Parameter of bytes; a `lowbit.nn.split.Split`."""

    def __init__(self, buffers: Mapping[str, Tensor | None]) -> None:
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]] | None] = {}
        self._size = 0
        for name, t in buffers.items():
            self._places[name] = None
            if t is not None:
                self._places[name] = self._size, t.dtype, tuple(t.shape)
                self._size += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT

    def __str__(self) -> str:
        return f"it is {self._size} bytes of a parameter that fully_shard may shard"

    def joined(self, buffers: Mapping[str, Tensor | None]) -> Tensor:
        """The bytes of tensors of these shapes."""
        given = {name: t for name, t in buffers.items() if t is not None}
        device = given["codes"].device
        made = torch.zeros(self._size, dtype=torch.uint8, device=device)
        for name, view in self._views(made).items():
            if view is not None:
                view.copy_(given[name])
        return made

    def _views(self, flat: Tensor) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        for name, place in self._places.items():
            if place is None:
                made[name] = None
                continue
            start, dtype, shape = place
            size = math.prod(shape) * dtype.itemsize
            made[name] = flat[start : start + size].view(dtype).view(shape)
        return made

    def _tensors(self, layer: Any) -> dict[str, Tensor | None]:
        flat = layer._parameters[BYTES]
        if isinstance(flat, DTensor):
            raise RuntimeError(
                f"the weight of this {type(layer).__name__} is sharded and was not gathered: call the module that "
                "fully_shard was given"
            )
        return self._views(flat)

    def is_plain(self, layer: Any) -> bool:
        """No: the buffers hold no values."""
        return False

    def take(self, x: Tensor) -> Tensor:
        """x: nothing of it is elsewhere."""
        return x

    def give(self, y: Tensor) -> Tensor:
        """y: nothing of it is elsewhere."""
        return y

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """x W^T + bias."""
        return layer.product(x, layer._parameters["bias"], self._tensors(layer))  # type: ignore[no-any-return]

    def convolution(self, layer: Any, x: Tensor) -> Tensor:
        """The convolution of x."""
        return layer.product(x, self._tensors(layer))  # type: ignore[no-any-return]

    def embedding(self, layer: Any, indices: Tensor) -> Tensor:
        """Rows of the weight."""
        return layer.rows(indices, self._tensors(layer))  # type: ignore[no-any-return]

    def save(self, layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
        """Puts the canonical tensors into a state dict; of a parameter that is sharded the rows of this rank."""
        flat = layer._parameters[BYTES].detach()
        sharded = isinstance(flat, DTensor)
        weight = layouts.from_kernel(layer._make_weight(self._views(whole(flat))))
        for name, t in weight.tensors.items():
            state_dict[prefix + name] = _rows(t, flat.device_mesh) if sharded else t

    def load(
        self, layer: Any, state_dict: Mapping[str, Any], prefix: str
    ) -> tuple[Mapping[str, Any], Collection[str]]:
        """Fills the bytes with the canonical tensors of a state dict, whole or DTensors.

        Raises:
            TypeError, ValueError: as `QuantTensor.validate`, or the state is that of another format or shape.
        """
        made = dict(state_dict)
        names = tensor_specs(layer.format, *layer.shape)
        given = {n: made.pop(prefix + n) for n in names if prefix + n in made}
        if given.keys() != names.keys():
            return state_dict, ()
        if f"{prefix}_extra_state" in made:
            layer.set_extra_state(made[f"{prefix}_extra_state"])
        full = {}
        for name, t in given.items():
            full[name] = whole(t)
            states.check_tensor(name, full[name])
        flat = layer._parameters[BYTES].detach()
        local = flat.to_local() if isinstance(flat, DTensor) else flat
        weight = QuantTensor.from_file(layer.format, layer.shape, full).validate().to(local.device)
        more = {"like": layer} if isinstance(layer, QuantConv) else {}
        blank = type(layer).from_quant_tensor(weight, **more)
        values = self.joined(blank._buffers)
        if isinstance(flat, DTensor):
            values = _rows(values, flat.device_mesh).to_local()
        with torch.no_grad():
            local.copy_(values)
        return made, names


def _rows(t: Tensor, mesh: Any) -> DTensor:
    """What is the same on all ranks, as a DTensor of which each keeps its rows."""
    # Not every backend sends float8, and `full_tensor` would.
    if t.dim() == 0 or len(t) == 1 or states.is_float8(t):
        return DTensor.from_local(t, mesh, [Replicate()], run_check=False)
    width = -(-len(t) // mesh.size())
    start = mesh.get_local_rank() * width
    local = t[start : start + width].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=t.shape, stride=t.stride()
    )
