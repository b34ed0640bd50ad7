"""Tensor parallelism of packed weights: styles for torch's `parallelize_module`, and `parallelize` for whole models.

A rank holds rows of a weight (`ColwiseParallel` of a linear, the vocabulary of an embedding) or columns of it
(`RowwiseParallel`), of its codes, scales, zeros, tables, outliers and low-rank term alike: dequantized, a part is that
of the dequantized weight, bit for bit. Sizes that do not divide are cut as `torch.chunk` cuts them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import parallel
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.integrations.parts import Part, part_of
from lowbit.nn import PackedModule, QuantEmbedding, QuantExperts, QuantLinear, ReorderedLinear
from lowbit.nn.embedding import ScaledQuantEmbedding
from lowbit.weights.quantized import QuantTensor

__all__ = ["ColwiseParallel", "PackedColwiseParallel", "RowwiseParallel", "part_of"]

_KINDS = (QuantLinear, ReorderedLinear, QuantEmbedding, ScaledQuantEmbedding)
# Codes that several modules share -> the modules that took a part of them: those of equal parts share it, too.
_taken = WeakTensorKeyDictionary()


def split(
    layer: PackedModule,
    mesh: DeviceMesh,
    dim: int,
    *,
    packed: int = 1,
    layouts: tuple[Any, Any] | None = None,
    local: bool = True,
) -> None:
    """Leaves a layer with the part of its weight that this rank holds, and lets it compute with those of the others.

    Args:
        layer: whole, and the same on all ranks.
        mesh: of one dimension.
        dim, packed: as in `part_of`.
        layouts: placements of its input and its output. None: it takes its part of the input and gives its part of
            the output, or a summand of it, and others see to the rest.
        local: whether its output is a plain tensor and no DTensor.

    Raises:
        NotImplementedError: the layer is of a kind that cannot be split.
        ValueError: as `part_of`; it is split already, or parts of its weight are learnable.
    """
    kind = type(layer).__name__
    if type(layer) not in _KINDS or (dim == 1 and isinstance(layer, ReorderedLinear)):
        how = "along K" if dim == 1 and isinstance(layer, ReorderedLinear) else "over ranks"
        raise NotImplementedError(f"a {kind} cannot be split {how}")
    if layer.split is not None:
        raise ValueError(f"the {kind} is split already: {layer.split}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: slice it, as mesh['tp']")
    rank, world = mesh.get_local_rank(), mesh.size()
    key = dim, packed, rank, world
    codes, tied = layer._buffers["codes"], layer._tied
    taken: dict[Any, Any] = _taken.setdefault(codes, {}) if tied else {}
    first = taken[key]() if key in taken else None
    made = Part(mesh, dim, layer.format, layer.shape, packed, layouts, local)
    if first is not None:
        layer.share_weight(first)
    else:
        weight = layer.own_part()
        activation = weight.format.activation, weight.format.activation_group
        static = getattr(layer, "input_scale", None) is not None
        if static:  # one scale for all of x, which no cut changes
            plain = weight.format.with_activation(None)
            weight = QuantTensor(plain, weight.shape, weight.tensors)
        part = part_of(weight, dim, rank, world, packed=packed)
        if static:
            part = QuantTensor(part.format.with_activation(*activation), part.shape, part.tensors)
        layer.set_weight(part)
        taken[key] = weakref.ref(layer)
    bias = layer._parameters.get("bias")
    if bias is not None and dim == 0:
        own = made.vector(bias.detach())
        layer.bias = nn.Parameter(own.clone(), requires_grad=bias.requires_grad)
    layer.split = made


def split_experts(
    experts: QuantExperts,
    mesh: DeviceMesh,
    dim: int,
    *,
    packed: int = 1,
    layouts: tuple[Any, Any] | None = None,
) -> None:
    """As `split`, every expert alike.

    Raises:
        NotImplementedError, ValueError: as `split`, naming the expert; or there are dense ones.
    """
    for e, layer in enumerate(experts):
        if not isinstance(layer, PackedModule):
            raise NotImplementedError(f"expert {e} is a dense {type(layer).__name__}: quantize all")
        try:
            split(layer, mesh, dim, packed=packed)
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"expert {e}: {error}") from error
    first: Any = experts[0]
    experts.split = None if layouts is None else first.split.with_layouts(*layouts)


class _Packed:
    """What styles have in common: packed layers are theirs, others those of torch's style."""

    input_layouts: Any
    output_layouts: Any
    use_local_output: bool
    packed = 1

    def _split(self, module: nn.Module, mesh: DeviceMesh) -> bool:
        layouts = self.input_layouts[0], self.output_layouts[0]
        if isinstance(module, QuantExperts):
            if not self.use_local_output:
                raise NotImplementedError(
                    "experts give plain tensors: use_local_output must be True"
                )
            split_experts(module, mesh, self._dim(module), packed=self.packed, layouts=layouts)
        elif isinstance(module, PackedModule):
            dim, local = self._dim(module), self.use_local_output
            split(module, mesh, dim, packed=self.packed, layouts=layouts, local=local)
        return isinstance(module, QuantExperts | PackedModule)

    def _dim(self, module: nn.Module) -> int:
        raise NotImplementedError


class ColwiseParallel(_Packed, parallel.ColwiseParallel):  # type: ignore[misc]
    """torch's `ColwiseParallel`, for packed layers too: a rank has some of the outputs of a linear or of every expert,
    or some columns of every row of an embedding.

    Args:
        input_layouts, output_layouts, use_local_output: as in torch's.

    Raises:
        NotImplementedError, ValueError: when it is applied, as `split`.

    Example:
        >>> plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        >>> parallelize_module(model, init_device_mesh("cpu", (2,)), plan)  # doctest: +SKIP
    """

    def _dim(self, module: nn.Module) -> int:
        return 1 if isinstance(module, QuantEmbedding) else 0

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self._split(module, device_mesh):
            return module
        return super()._apply(module, device_mesh)  # type: ignore[no-any-return]


class RowwiseParallel(_Packed, parallel.RowwiseParallel):  # type: ignore[misc]
    """torch's `RowwiseParallel`, for packed layers too: a rank has some of the inputs of a linear or of every expert,
    whose products are added up, or some rows of an embedding.

    Args:
        input_layouts, output_layouts, use_local_output: as in torch's; inputs are split on their last dimension unless
            they are said to be replicated, as indices of an embedding are.

    Raises:
        NotImplementedError, ValueError: when it is applied, as `split`: where the cut goes through groups that cannot
            be cut, above all.

    Example:
        As that of `ColwiseParallel`.
    """

    def _dim(self, module: nn.Module) -> int:
        return 0 if isinstance(module, QuantEmbedding) else 1

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self._split(module, device_mesh):
            return module
        return super()._apply(module, device_mesh)  # type: ignore[no-any-return]


class PackedColwiseParallel(ColwiseParallel):
    """As `ColwiseParallel`, of a weight that is several, one below the other, as gate and up projections are: a rank
    has its part of each. The output stays in parts.

    Args:
        packed: how many there are.
    """

    def __init__(self, packed: int = 2) -> None:
        super().__init__()
        self.packed = packed

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not self._split(module, device_mesh):
            raise NotImplementedError(f"a {type(module).__name__} is not packed")
        return module
