"""Layers of programs that serve models (vLLM, SGLang), whose weights a lowbit checkpoint holds.

Such a program calls several linears of a checkpoint as one (q, k and v), cuts them among processes, and hands tensors
over one by one as it reads them. Nothing of such a program is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import reference
from lowbit.files import cut, shown
from lowbit.formats import Format
from lowbit.integrations.parts import part_of
from lowbit.io.native import prefix_of
from lowbit.io.readers.native import NativeReader
from lowbit.io.safetensors_file import Specs
from lowbit.nn import QuantEmbedding, QuantLinear, states
from lowbit.ops.many import linear_many
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.slices import rows_of, stacked

ORDER, INPUT_SCALE = "input_order", "input_scale"
# What a layer may have beside its weight and its bias.
_EXTRAS = (ORDER, INPUT_SCALE)
_MARKER, _STATE = "weight", "_extra_state"
Weight = QuantTensor | Tensor


@dataclass(frozen=True)
class Stored:
    """A packed layer of a checkpoint.

    Attributes:
        format, shape: those of its weight, (N, K).
        dtypes: of its tensors in the files, by their names in the layer; without the bias.
    """

    format: Format
    shape: tuple[int, int]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Shard:
    """A linear of the checkpoint that is a layer of the program, or a part of one; dense without `stored`."""

    name: str
    stored: Stored | None


@dataclass(frozen=True)
class Catalog:
    """What packed layers a checkpoint holds; no tensors.

    Attributes:
        layers: by the names of their modules.
        tied: names of layers that share the weight of another, and its name.
    """

    layers: Mapping[str, Stored] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Catalog:
        """That of a checkpoint, of whose files the headers are read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not of lowbit, or damaged.
        """
        where = Path(path)
        if not NativeReader.detect(where):
            raise ValueError(
                f"{where}: config.json names quant_method 'lowbit', and no file of the checkpoint has the metadata "
                "that lowbit.save, `lowbit quantize` and save_pretrained write"
            )
        reader = NativeReader(where)
        layers = {}
        for name, (format, shape) in reader.header.layers.items():
            prefix = prefix_of(name)
            dtypes = {key: dtype for key, (_, dtype) in reader.specs(name).items()}
            dtypes |= _extras(reader.dense, prefix)
            for key in (_MARKER, _STATE):
                if prefix + key in reader.beside:
                    dtypes[key] = torch.uint8
            layers[name] = Stored(format, shape, dtypes)
        tied = {name: first for name, first in reader.header.tied.items() if first in layers}
        return cls(layers, tied)

    def renamed(self, names: Callable[[str], str | None]) -> Catalog:
        """The same with other names; what `names` gives none for is left out."""
        layers = {new: s for name, s in self.layers.items() if (new := names(name)) is not None}
        tied = {
            new: first
            for name, other in self.tied.items()
            if (new := names(name)) is not None and (first := names(other)) is not None
        }
        return Catalog(layers, tied)

    def shards(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[Shard]:
        """The linears of the checkpoint that a layer of the program is.

        Args:
            prefix: its name.
            packed: {last part of the name of a layer: those of the linears that it is, one below the other}.

        Returns:
            In that order; [] if the checkpoint has all of it dense.
        """
        if (own := self._find(prefix)) is not None:
            return [Shard(prefix, own)]
        parent, _, last = prefix.rpartition(".")
        names = [prefix_of(parent) + name for name in packed.get(last, ())]
        found = [Shard(name, self._find(name)) for name in names]
        return found if any(shard.stored for shard in found) else []

    def refuse_inside(self, prefix: str, program: str) -> None:
        """Raises NotImplementedError if layers within a module are packed: it is of experts, which `program` computes
        at once.
        """
        inside = [name for name in self.layers if name.startswith(prefix_of(prefix))]
        if inside:
            raise NotImplementedError(
                f"{prefix}: packed experts are not computed in {program}, and the checkpoint has {len(inside)} such "
                f"weights ({cut(inside[0])}, ...): leave them dense (--skip experts), or run it with lowbit.load_model"
            )

    def _find(self, name: str) -> Stored | None:
        return self.layers.get(self.tied.get(name, name))


def _extras(dense: Specs, prefix: str) -> dict[str, torch.dtype]:
    return {key: dense[prefix + key][1] for key in _EXTRAS if prefix + key in dense}


class Pieces:
    """Tensors of one layer, as they are read.

    Args:
        shards: of `Catalog.shards`.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._taken: list[dict[str, Tensor]] = [{} for _ in self.shards]

    def dtypes(self) -> dict[str, torch.dtype]:
        """The tensors to expect, by their names in a shard, and the dtype of the first of each name."""
        found: dict[str, torch.dtype] = {}
        for shard in self.shards:
            stored = {} if shard.stored is None else shard.stored.dtypes
            for name, dtype in stored.items():
                found.setdefault(name, dtype)
        # Of dense shards; and where there are none, of the file that transformers shall refuse.
        return {**found, _MARKER: found.get(_MARKER, torch.uint8)}

    def take(self, index: int, name: str, t: Tensor) -> None:
        """Keeps a tensor of a shard.

        Raises:
            ValueError: there is one of this name, or none to expect.
        """
        if not 0 <= index < len(self.shards):
            raise ValueError(
                f"{self.shards[0].name}: is {len(self.shards)} linears of the checkpoint, got a tensor "
                f"{shown(name)} of number {index}"
            )
        if name in self._taken[index]:
            raise ValueError(f"{self.shards[index].name}: got {shown(name)} twice")
        self._taken[index][name] = t

    def weights(self) -> list[tuple[Weight, dict[str, Tensor]]]:
        """The weight of each shard, packed as stored or dense, and what is beside it (`_EXTRAS`). They are handed out
        once.

        Raises:
            ValueError: naming the layer and what is missing or wrong in it.
        """
        taken, self._taken = self._taken, [{} for _ in self.shards]
        return [self._weight(shard, t) for shard, t in zip(self.shards, taken, strict=True)]

    def _weight(self, shard: Shard, given: dict[str, Tensor]) -> tuple[Weight, dict[str, Tensor]]:
        weight = given.pop(_MARKER, None)
        if shard.stored is None:
            if weight is None or weight.dim() != 2 or not weight.is_floating_point():
                got = (
                    "nothing"
                    if weight is None
                    else f"{weight.dtype} of shape {tuple(weight.shape)}"
                )
                raise ValueError(f"{shard.name}.weight must be a dense matrix, got {got}")
            return weight, {}
        if weight is not None and not states.is_marker(weight):
            raise ValueError(
                f"{shard.name}: the checkpoint has the layer packed, and a dense weight of shape {tuple(weight.shape)}"
            )
        format, shape = shard.stored.format, shard.stored.shape
        try:
            if (state := given.pop(_STATE, None)) is not None:
                states.check(state, format, shape)
            extras = {name: given.pop(name) for name in _EXTRAS if name in given}
            return QuantTensor.from_file(format, shape, given).validate(), extras
        except (TypeError, ValueError) as e:
            raise ValueError(f"{shard.name}: {e}") from e


@dataclass(frozen=True)
class Place:
    """Which part of a layer a process holds.

    Attributes:
        rank, world: of how many.
        rows: how many rows of each matrix of the layer it has; several matrices may be one shard.
        columns: how many columns of all.
        parts: in how many parts each matrix is cut: fewer than there are processes where some hold the same rows.
            None: as many as `rows` says.
    """

    rank: int
    world: int
    rows: tuple[int, ...]
    columns: int
    parts: tuple[int, ...] | None = None

    def cut(self, weights: Sequence[Weight], names: Sequence[str]) -> list[Weight]:
        """What the process has of the shards of a layer.

        Raises:
            ValueError: naming the layer, its sizes, the number of processes and why it cannot be cut.
        """
        made: list[Weight] = []
        each = [self.rows] if len(weights) == 1 else [(n,) for n in self.rows]
        parts = self.parts and ([self.parts] if len(weights) == 1 else [(p,) for p in self.parts])
        if len(each) != len(weights):
            raise ValueError(
                f"{names[0]}: the layer is {len(self.rows)} matrices, and the checkpoint has {len(weights)}"
            )
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            try:
                made += self._cut_one(weight, each[i], parts[i] if parts else None)
            except (ValueError, NotImplementedError) as e:
                raise type(e)(f"{cut(name)}: {e}") from e
        return made

    def _cut_one(
        self, weight: Weight, rows: tuple[int, ...], parts: tuple[int, ...] | None
    ) -> list[Weight]:
        n, k = weight.shape
        if k % self.columns or k // self.columns not in (1, self.world):
            raise ValueError(
                f"{self.world} processes cannot have {self.columns} of its {k} columns each"
            )
        if parts is None:
            parts = (n // sum(rows),) * len(rows)
        if sum(r * p for r, p in zip(rows, parts, strict=True)) != n or any(
            p < 1 or self.world % p for p in parts
        ):
            raise ValueError(
                f"{self.world} processes cannot have {' and '.join(map(str, rows))} of its {n} rows each"
            )
        made, start = [], 0
        for count, number in zip(rows, parts, strict=True):
            whole = rows_between(weight, start, start + count * number)
            made.append(_part(whole, 0, self.rank * number // self.world, number))
            start += count * number
        return [_part(w, 1, self.rank, k // self.columns) for w in made]


def rows_between(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start .. stop - 1; where that cuts scales of double quantization, they become fp32."""
    if (start, stop) == (0, weight.shape[0]):
        return weight
    if isinstance(weight, Tensor):
        return weight[start:stop]
    return rows_of(reference.in_one_level(weight), slice(start, stop))


def _part(weight: Weight, dim: int, rank: int, parts: int) -> Weight:
    if parts == 1:
        return weight
    if isinstance(weight, Tensor):
        return weight.chunk(parts, dim)[rank].contiguous()
    return part_of(weight, dim, rank, parts)


class Product(nn.Module):
    """x W^T + bias with weights one below the other, as few calls as their formats allow.

    Args:
        weights: (N_i, K) each, packed or dense, on the device where it runs.
        extras: what is beside each: `input_order` (K,) int64 and `input_scale` (), or nothing.
        dtype: of dense ones.

    Example:
        >>> q, k = (lowbit.quantize(torch.randn(64, 128), "nf4") for _ in range(2))
        >>> Product([q, k])(torch.randn(3, 128)).shape
        torch.Size([3, 128])
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        extras: Sequence[Mapping[str, Tensor]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        beside = [{}] * len(weights) if extras is None else list(extras)
        self.parts = nn.ModuleList()
        for group, more in _joined(weights, beside):
            if isinstance(group, QuantTensor):
                self.parts.append(_Packed(group, more, dtype))
            else:
                self.parts.append(_Dense(group.to(dtype)))
        self.sizes = [part.rows for part in self.parts]
        self._plain = all(isinstance(p, _Packed) and p.is_plain() for p in self.parts)
        layout = {p.linear.layout for p in self.parts if isinstance(p, _Packed)}
        self._together = self._plain and len(self.parts) > 1 and len(layout) == 1

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) gives (..., N) in its dtype; checks as `lowbit.linear`."""
        if len(self.parts) == 1:
            made: Tensor = self.parts[0](x, bias)
            return made
        biases = [None] * len(self.sizes) if bias is None else list(bias.split(self.sizes))
        if self._together:
            ys = linear_many(x, [p.linear.operands() for p in self.parts], biases)  # type: ignore[union-attr, operator]
        else:
            ys = [part(x, b) for part, b in zip(self.parts, biases, strict=True)]
        return torch.cat(ys, -1)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, (N, K)."""
        return torch.cat([part.dense(dtype) for part in self.parts])  # type: ignore[operator]


def _joined(
    weights: Sequence[Weight], extras: Sequence[Mapping[str, Tensor]]
) -> list[tuple[Weight, Mapping[str, Tensor]]]:
    """Neighbours of one format as one weight."""
    made: list[tuple[Weight, Mapping[str, Tensor]]] = []
    for weight, more in zip(weights, extras, strict=True):
        if made and not more and not made[-1][1]:
            last = made[-1][0]
            both: Weight | None = None
            if isinstance(last, QuantTensor) and isinstance(weight, QuantTensor):
                both = stacked([last, weight])
            elif isinstance(last, Tensor) and isinstance(weight, Tensor):
                both = torch.cat([last, weight])
            if both is not None:
                made[-1] = both, {}
                continue
        made.append((weight, more))
    return made


class _Packed(nn.Module):
    def __init__(
        self, weight: QuantTensor, extras: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.linear = QuantLinear.from_quant_tensor(weight, None, dtype)
        self.rows = weight.shape[0]
        if INPUT_SCALE in extras:
            self.linear.set_input_scale(extras[INPUT_SCALE])
        order = extras.get(ORDER)
        if order is not None:
            _check_order(order, weight.shape[1])
            order = order.to(weight.device)
        self.register_buffer("order", order, persistent=False)

    def is_plain(self) -> bool:
        return self.order is None and self.linear.is_plain() and not self.linear.format.more_terms

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        order = self._buffers["order"]
        return self.linear.product(x if order is None else x.index_select(-1, order), bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        made = self.linear.weight_source()().to(dtype)
        order = self._buffers["order"]
        return made if order is None else made.index_select(1, torch.argsort(order))


class Rows(nn.Module):
    """Rows of one weight, and products with it: an embedding, a head, or both.

    Args:
        weight: (N, K), on the device where it runs.
        dtype: of the rows.
    """

    def __init__(self, weight: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = QuantEmbedding.from_quant_tensor(weight, dtype)
        self.head = QuantLinear.tied_to(self.rows)

    def forward(self, indices: Tensor) -> Tensor:
        """Rows: indices (...) int64 give (..., K)."""
        return self.rows.rows(indices)

    def product(self, x: Tensor, bias: Tensor | None, columns: int) -> Tensor:
        """x W^T + bias for x (..., K): (..., columns), those beyond N zero."""
        n = self.rows.num_embeddings
        y = self.head.product(x, None if bias is None else bias[:n])
        return F.pad(y, (0, columns - n)) if columns > n else y


def _check_order(order: Tensor, k: int) -> None:
    straight = torch.arange(k, dtype=torch.int64, device=order.device)
    if order.dtype != torch.int64 or not torch.equal(order.sort().values, straight):
        raise ValueError(
            f"{ORDER} must hold each of 0 .. {k - 1} once, got {order.dtype} of shape {tuple(order.shape)}: a "
            "layer whose columns are in another order cannot be cut along them"
        )


class _Dense(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.shape[0]
        self.register_buffer("weight", weight.contiguous(), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._buffers["weight"], bias)  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        return weight.to(dtype)
