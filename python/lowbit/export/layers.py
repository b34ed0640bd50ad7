"""What of a model is written: its packed layers, its dense tensors, and which of them are tied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.nn import JoinedLinear, PackedModule, QuantEmbedding, QuantLinear, ReorderedLinear
from lowbit.nn.embedding import ScaledQuantEmbedding
from lowbit.weights.quantized import QuantTensor

# A subclass may compute something else with its weight.
_KINDS = (QuantLinear, ReorderedLinear, QuantEmbedding, ScaledQuantEmbedding)


@dataclass
class Exported:
    """What became of a model.

    Attributes:
        path: what was written.
        packed: the type of every layer that is written as it is, by name.
        requantized: the type of every layer that was quantized anew.
        decoded: packed layers that are written dense.
        dense: matrices that were dense, and are.
    """

    path: Path
    packed: dict[str, str] = field(default_factory=dict)
    requantized: dict[str, str] = field(default_factory=dict)
    decoded: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.packed)} layers packed as they are"]
        for what, layers in (("quantized anew", self.requantized), ("decoded", self.decoded)):
            if layers:
                parts.append(f"{len(layers)} {what}")
        return f"{', '.join(parts)}, {len(self.dense)} dense"


def packed_layers(model: nn.Module) -> dict[str, PackedModule]:
    """The packed layers of a model by name, without a head that shares the weight of the embedding.

    Raises:
        NotImplementedError: a layer computes something else than a product or a row of its weight.
        ValueError: the model has no packed layer.
    """
    found: dict[str, PackedModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, JoinedLinear):
            raise NotImplementedError(
                f"{name} is a JoinedLinear, whose halves are one weight elsewhere: load the model with format=, "
                "or make it dense (lowbit.dequantize_model)"
            )
        if not isinstance(module, PackedModule):
            continue
        if type(module) not in _KINDS:
            raise NotImplementedError(
                f"{name} is a {type(module).__name__}; expected a QuantLinear or a QuantEmbedding"
            )
        if not any(module.shares_weight(other) for other in found.values()):
            found[name] = module
    if not found:
        raise ValueError("the model has no packed layer: quantize it first (lowbit.quantize_model)")
    return found


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are no part of a packed weight, biases of packed layers included; what is tied
    comes once, under its first name.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in _own_tensors(model):
        found.setdefault(id(t), (name, t))
    return {name: t.detach() for name, t in found.values()}


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        buffers = {
            k: t for k, t in module._buffers.items() if k not in module._non_persistent_buffers_set
        }
        for leaf, t in {**module._parameters, **buffers}.items():
            if t is not None and (leaf == "bias" or not isinstance(module, PackedModule)):
                yield (f"{prefix}.{leaf}" if prefix else leaf), t


def values_of(module: PackedModule) -> Tensor:
    """The weight, (N, K) fp32, its columns in the order of x."""
    values = module.quant_tensor().dequantize()
    order = order_of(module)
    return values if order is None else values.index_select(1, torch.argsort(order))


def order_of(module: PackedModule) -> Tensor | None:
    """Which column of x each column of a weight multiplies, (K,) int64; None if its own."""
    return module.input_order.detach() if isinstance(module, ReorderedLinear) else None


def shape_of(module: PackedModule) -> tuple[int, int]:
    """(N, K) of a layer's weight."""
    if isinstance(module, QuantEmbedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, QuantLinear)
    return module.out_features, module.in_features


def on_cpu(weight: QuantTensor) -> QuantTensor:
    """The weight, where files are written from."""
    return weight if weight.device.type == "cpu" else weight.to("cpu")
