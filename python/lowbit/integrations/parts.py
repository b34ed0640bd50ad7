"""Part: a module's part of a packed weight that is spread over the ranks of a mesh: what it computes, and what of it is
in state dicts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lowbit import reference
from lowbit.codebooks.tables import digits_per_byte
from lowbit.formats import Format
from lowbit.nn import states
from lowbit.weights.quantized import QuantTensor, tensor_specs
from lowbit.weights.slices import (
    columns_of,
    cuts_second_level,
    is_by_column,
    is_by_row,
    rows_of,
)


def bounds(size: int, rank: int, world: int, what: str) -> tuple[int, int, int]:
    """Where the part of a rank begins and ends, and how large all but the last are; as `torch.chunk`.

    Raises:
        ValueError: a rank would have nothing, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    width = -(-size // world)
    if width * (world - 1) >= size:
        raise ValueError(
            f"{size} {what} in parts of {width} leave nothing for the last of {world} ranks"
        )
    return rank * width, min(size, (rank + 1) * width), width


def part_of(
    weight: QuantTensor, dim: int, rank: int, world: int, *, packed: int = 1
) -> QuantTensor:
    """What a rank holds of a weight.

    Scales of double quantization, whose factors go over all rows, become fp32 where a cut goes through what shares one;
    groups that a cut along K goes through become smaller ones (`lowbit.weights.slices.column_format`). Both on all
    ranks alike.

    Args:
        weight: (N, K), whole.
        dim: 0 for rows, 1 for columns.
        rank, world: which part of how many.
        packed: of how many matrices, one below the other, `weight` consists, each of which is cut: 2 for gate and up
            projections in one. 1 with columns.

    Returns:
        About a world-th of the weight: ceil(N / world) rows, or columns, and fewer on the last rank.

    Raises:
        ValueError: a rank would have nothing, a matrix of `packed` is no whole number of rows, or the cut goes through
            what cannot be cut; naming format, sizes, world size and reason.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "nf4")
        >>> torch.equal(part_of(qt, 1, 1, 2).dequantize(), qt.dequantize()[:, 64:])
        True
    """
    n, k = weight.shape
    if dim == 0:
        if packed < 1 or n % packed:
            raise ValueError(f"rows must be those of {packed} matrices of equal size, got {n} rows")
        each = n // packed
        start, stop, width = bounds(each, rank, world, "rows")
        if cuts_second_level(weight.format, k, width) or (
            packed > 1 and weight.scales2 is not None
        ):
            weight = reference.in_one_level(weight)
        if packed == 1:
            return rows_of(weight, slice(start, stop))
        rows = torch.arange(n, dtype=torch.int64, device=weight.device).view(packed, each)
        return rows_of(weight, rows[:, start:stop].flatten())
    start, stop, width = bounds(k, rank, world, "columns")
    try:
        return columns_of(reference.in_one_level(weight), start, stop, width)
    except ValueError as e:
        raise ValueError(
            f"a {n} x {k} weight in format {weight.format.name!r} (groups of {weight.format.group or 'whole rows'}) "
            f"cannot be cut along K for {world} ranks, every {width} columns: {e}"
        ) from e


class Part:
    """One rank's part of a weight; a `lowbit.nn.split.Split`.

    Args:
        mesh: of one dimension.
        dim: what is cut, 0 (N) or 1 (K).
        format, shape: those of the whole weight.
        packed: how many matrices it consists of (`part_of`).
        layouts: placements of input and output; None if others see to them.
        local: whether the output is a plain tensor.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        dim: int,
        format: Format,
        shape: tuple[int, int],
        packed: int,
        layouts: tuple[Any, Any] | None,
        local: bool,
    ) -> None:
        self.mesh, self.dim, self.format, self.shape = mesh, dim, format, shape
        self.packed, self.layouts, self.local = packed, layouts, local
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        self.start, self.stop, self.width = bounds(
            shape[dim] // packed, self.rank, self.world, ("rows", "columns")[dim]
        )
        if packed > 1 and layouts is not None and layouts[1] != Shard(-1):
            raise NotImplementedError(
                f"parts of {packed} weights in one are not put together again: output_layouts must be Shard(-1), "
                f"got {layouts[1]}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        return copy.copy(self)  # with the same mesh

    def with_layouts(self, given: Any, wanted: Any) -> Part:
        """The same part with these placements of input and output."""
        made = copy.copy(self)
        made.layouts = given, wanted
        return made

    def __str__(self) -> str:
        n, k = self.shape
        what = ("rows", "columns")[self.dim]
        return f"part {self.rank} of {self.world} along the {what} of {n} x {k} {self.format.name}"

    def vector(self, t: Tensor) -> Tensor:
        """The part of a vector (N,) that belongs to a part of the rows."""
        return t.view(self.packed, -1)[:, self.start : self.stop].flatten()

    def is_plain(self, layer: Any) -> bool:
        """Whether a call of a linear is the product of its buffers and its bias, and nothing else."""
        return self.layouts is None and (self.dim == 0 or layer._parameters["bias"] is None)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """What a linear gives with the whole weight; without layouts, its part or its summand."""
        bias = layer._parameters["bias"]
        if self.layouts is None:
            # A sum over ranks has the bias once.
            return layer.product(x, bias if self.dim == 0 or self.rank == 0 else None)  # type: ignore[no-any-return]
        if self.dim == 0:
            return self.give(layer.product(self.take(x), bias))
        y = self.give(layer.product(self.take(x), None))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, indices: Tensor) -> Tensor:
        """Rows of the whole weight.

        Raises:
            IndexError: an index is outside [0, N).
        """
        indices = self._enter(indices, Replicate(), indices.shape[-1] * self.world)
        if self.dim == 1:
            return self._leave(layer.rows(indices), self.shape[1])
        low, high = 0, self.shape[0] - 1
        if not torch.compiler.is_compiling() and indices.numel():
            least, most = (int(bound) for bound in indices.aminmax())
            if least < low or most > high:
                wrong = least if least < low else most
                raise IndexError(f"indices must be in [0, {high + 1}), got {wrong}")
        inside = (indices >= self.start) & (indices < self.stop)
        rows = layer.rows((indices - self.start).clamp(0, self.stop - self.start - 1))
        return self._leave(rows * inside[..., None].to(rows.dtype), None)

    def take(self, x: Tensor) -> Tensor:
        """What the part multiplies of the input of the whole."""
        return self._enter(x, Replicate() if self.dim == 0 else Shard(-1), self.shape[1])

    def _enter(self, x: Tensor, wanted: Any, size: int) -> Tensor:
        assert self.layouts is not None
        given = self.layouts[0]
        learns = torch.is_grad_enabled() and x.requires_grad
        if not isinstance(x, DTensor):
            if given == wanted and (given != Replicate() or not learns):
                return x
            if given == Replicate() and not learns:
                return x[..., self.start : self.stop]
            x = self._dtensor(x, given, size)
        if x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        # Every rank has a summand of the gradient of what all of them multiply.
        grads = [Partial()] if wanted == Replicate() and x.requires_grad else None
        return x.to_local(grad_placements=grads)

    def give(self, y: Tensor) -> Tensor:
        """The output of the whole, of the part or the summand that is the product here."""
        return self._leave(y, self.shape[0] if self.dim == 0 else None)

    def _leave(self, y: Tensor, size: int | None) -> Tensor:
        """What is to be given of `y`: a part of so many values, or a summand."""
        assert self.layouts is not None
        wanted = self.layouts[1]
        learns = torch.is_grad_enabled() and y.requires_grad
        if size is not None and self.local and wanted in (Shard(-1), Shard(y.dim() - 1)):
            return y
        if size is None and self.local and wanted == Replicate() and not learns:
            y = y.contiguous()
            dist.all_reduce(y, group=self.mesh.get_group())
            return y
        if (
            size is not None
            and self.local
            and wanted == Replicate()
            and not learns
            and size % self.world == 0
        ):
            parts = [torch.empty_like(y) for _ in range(self.world)]
            dist.all_gather(parts, y.contiguous(), group=self.mesh.get_group())
            return torch.cat(parts, -1)
        made: Any = self._dtensor(y, Partial() if size is None else Shard(-1), size or 0)
        if made.placements != (wanted,):
            made = made.redistribute(placements=[wanted])
        return made.to_local() if self.local else made  # type: ignore[no-any-return]

    def _dtensor(self, t: Tensor, placement: Any, size: int) -> DTensor:
        """A DTensor of what is here; split on the last dimension, which has `size` in all, or whole, or a summand."""
        if placement not in (Shard(-1), Shard(t.dim() - 1)):
            return DTensor.from_local(t, self.mesh, [placement], run_check=False)
        return self._of_shape(t, Shard(t.dim() - 1), (*t.shape[:-1], size))

    def _of_shape(self, t: Tensor, placement: Any, shape: tuple[int, ...]) -> DTensor:
        stride = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
        return DTensor.from_local(
            t, self.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def save(self, layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes the tensors of a part DTensors of those of the whole.

        Raises:
            NotImplementedError: what the parts hold is not what the whole one holds, cut: they have numbers of outliers
                of their own, codes that do not end at a byte, or rows of several matrices.
        """
        format = self._whole_format(layer)
        for name, (shape, _) in tensor_specs(format, *self.shape).items():
            state_dict[prefix + name] = self._of_shape(
                state_dict[prefix + name].contiguous(), self._placement(format, name), shape
            )
        if (bias := state_dict.get(f"{prefix}bias")) is not None:
            placement = Shard(0) if self.dim == 0 else Replicate()
            state_dict[f"{prefix}bias"] = self._of_shape(bias, placement, self.shape[:1])
        state_dict[f"{prefix}_extra_state"] = states.encode(format, self.shape)

    def load(
        self, layer: Any, state_dict: Mapping[str, Any], prefix: str
    ) -> tuple[Mapping[str, Any], Collection[str]]:
        """A state dict with a module's part in the place of the whole: of DTensors as `save` makes them, of others, or
        of the tensors of the whole, in the format that the parts have together or in that which was split.

        Raises:
            ValueError: the format or the shape is another one.
        """
        made = dict(state_dict)
        if f"{prefix}_extra_state" in made:
            state = made[f"{prefix}_extra_state"]
            format = next(
                (f for f in (layer.format, self.format) if _says(state, f, self.shape)), None
            )
            if format is None:
                states.check(state, self.format, self.shape)
            made[f"{prefix}_extra_state"] = layer.get_extra_state()
        else:
            format = layer.format
        assert format is not None
        names = tensor_specs(format, *self.shape)
        given = {name: made.pop(prefix + name) for name in names if prefix + name in made}
        if given.keys() == names.keys():
            local = self._local(layer, format, given)
            made.update({prefix + name: t for name, t in local.items()})
        if (bias := made.get(f"{prefix}bias")) is not None:
            bias = whole(bias)
            made[f"{prefix}bias"] = self.vector(bias) if self.dim == 0 else bias
        return made, ()

    def _local(self, layer: Any, format: Format, given: dict[str, Any]) -> dict[str, Tensor]:
        if format == layer.format and all(
            isinstance(t, DTensor) and t.placements == (self._placement(format, name),)
            for name, t in given.items()
        ):
            return {name: t.to_local() for name, t in given.items()}
        full = {name: whole(t) for name, t in given.items()}
        weight = QuantTensor.from_file(format, self.shape, full)
        part = part_of(weight, self.dim, self.rank, self.world, packed=self.packed)
        if part.format != layer.format:
            raise ValueError(
                f"a part must be in format {layer.format.name!r}, got {part.format.name!r}"
            )
        return part.tensors

    def _whole_format(self, layer: Any) -> Format:
        """The format of what the parts are together.

        Raises:
            NotImplementedError: as `save`.
        """
        f: Format = layer.format
        reason = None
        if self.packed > 1:
            reason = f"they are rows of {self.packed} matrices"
        elif self.dim == 1 and f.outliers:
            reason = "each has as many outliers as its rows need"
        elif self.dim == 1 and any(_cuts_bytes(g, self.width) for g in (f, f.factor_format) if g):
            reason = f"codes of {self.width} columns in format {f.name!r} do not end at a byte"
        if reason:
            raise NotImplementedError(
                f"the parts of this weight cannot be put together in a state dict: {reason}; take that of the model "
                f"before it is split ({self})"
            )
        return f

    def _placement(self, format: Format, name: str) -> Any:
        if self.dim == 0:
            # Scales of double quantization are cut at whole blocks, and so are their factors.
            cut = is_by_row(format, name) or (format.scale == "dq8" and name == "scales2")
        else:
            cut = is_by_column(format, name, self.shape[1])
        return Shard(self.dim) if cut else Replicate()


def _cuts_bytes(format: Format, width: int) -> bool:
    """Whether codes of so many columns do not end at a byte."""
    if format.base:
        return width % digits_per_byte(format.base) != 0
    return format.num_vectors(width) * format.bits % 8 != 0


def whole(t: Any) -> Tensor:
    """The whole of a DTensor, also in a float dtype of a byte, which not every backend sends; others as they are."""
    if not isinstance(t, DTensor) or not states.is_float8(t):
        return t.full_tensor() if isinstance(t, DTensor) else t  # type: ignore[no-any-return]
    raw = DTensor.from_local(
        t.to_local().view(torch.uint8),
        t.device_mesh,
        t.placements,
        run_check=False,
        shape=t.shape,
        stride=t.stride(),
    )
    return raw.full_tensor().view(t.dtype)


def _says(state: Any, format: Format, shape: tuple[int, int]) -> bool:
    try:
        states.check(state, format, shape)
    except ValueError:
        return False
    return True
