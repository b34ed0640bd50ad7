"""What the nodes of transformers compute in integers, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.integer import functions
from lowbit.integer.coded import Coded
from lowbit.integer.execution import IntegerNode
from lowbit.integer.functions import Exponential
from lowbit.integer.graph import Node
from lowbit.integer.rescaling import (
    INT32_MAX,
    Grid,
    Rescale,
    by_dyadic,
    check_sums,
    power_of_two,
    round_by,
)
from lowbit.integer.transformer import Constant, Gelu, LayerNorm, MatMul, Requantize, Scale, Softmax

ROUNDING = "away"
# Fraction bits with which the bias of a layer norm is added.
_BIAS_BITS = 8
_TABLE_BITS = 12
Grids = Mapping[str, Grid]


@dataclass(frozen=True, kw_only=True)
class IntegerMatMul(IntegerNode):
    """A product of two activations, their zero points taken off first."""

    node: MatMul

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        a, b = (g.integers(q) for q, g in zip(inputs, grids, strict=True))
        return self.bounded(self.rescales[0].apply(self.node.product(a, b), -1) + self.grid.zero)


@dataclass(frozen=True, kw_only=True)
class IntegerSoftmax(IntegerNode):
    """Probabilities from integer exponentials, or their codes.

    Attributes:
        exponential: made for the scale of the logits and their number.
        direct: codes are log2 of sum over exponential (Log-Int-Softmax), without a probability.
    """

    exponential: Exponential
    direct: bool

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        x = grids[0].integers(inputs[0])
        if self.direct:
            return functions.log_softmax(x, self.exponential, self.grid.most - 1)
        p = functions.softmax(x, self.exponential)
        if isinstance(self.grid, Coded):
            return self.grid.encode(p, functions.SOFTMAX_BITS)
        return self.bounded(self.rescales[0].apply(p, -1) + self.grid.zero)


@dataclass(frozen=True, kw_only=True)
class IntegerTable(IntegerNode):
    """A function of one activation of 12 bits or fewer, as a table of its results.

    Attributes:
        table: int64 (2^bits,), from the least integer on.
    """

    table: Tensor

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        return self.table[inputs[0] - grids[0].least]


@dataclass(frozen=True, kw_only=True)
class IntegerLayerNorm(IntegerNode):
    """A layer norm: normalized values times the weight's size by channel, plus the bias, to the grid.

    Attributes:
        lift: of the input's integers, so that their squares use int32.
        eps: on the grid of the sum of squares.
        signs: of the weight, (K,) int64, -1 or 1; its size is in `rescales`, and `bias` has fraction bits.
    """

    lift: int
    eps: int
    signs: Tensor

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        assert self.out is not None
        assert self.bias is not None
        z = functions.layer_norm(grids[0].integers(inputs[0]), self.lift, self.eps) * self.signs
        y = self.rescales[0].apply(z, -1) + self.bias
        return self.bounded(self.out.apply(y, -1) + self.grid.zero)


@dataclass(frozen=True, kw_only=True)
class IntegerConstant(IntegerNode):
    """The integers of a parameter, `weight`, for each sample."""

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        assert self.weight is not None
        return self.weight.expand(inputs[0].shape[0], *self.node.shape)


@dataclass(frozen=True, kw_only=True)
class IntegerCopy(IntegerNode):
    """The same integers, or, where it has `rescales`, those of another grid."""

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """(batch, *shape) int64."""
        if not self.rescales:
            return inputs[0]
        y = self.rescales[0].apply(grids[0].integers(inputs[0]), -1)
        return self.bounded(y + self.grid.zero)


def _fields(node: Node, grid: Grid) -> dict[str, Any]:
    return {"node": node, "grid": grid, "low": grid.least, "high": grid.most, "rounding": ROUNDING}


def _factor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, device="cpu")


def matmul(node: MatMul, grids: Grids) -> IntegerMatMul:
    """In integers.

    Raises:
        ValueError: sums may overflow int32.
    """
    a, b = (grids[name] for name in node.inputs)
    grid = grids[node.name]
    check_sums(node.depth * (a.bound + abs(a.zero)) * (b.bound + abs(b.zero)), node.where)
    rescale = by_dyadic(_factor(a.scale * b.scale * node.alpha / grid.scale), node.where)
    return IntegerMatMul(**_fields(node, grid), rescales=(rescale,))


def softmax(node: Softmax, grids: Grids, shift: bool, direct: bool) -> IntegerSoftmax:
    """In integers, by Shiftmax's exponential or the polynomial."""
    scale, count, grid = grids[node.inputs[0]].scale, node.shape[-1], grids[node.name]
    make = functions.ShiftExponential.of if shift else functions.PolynomialExponential.of
    try:
        exponential = make(scale, count)
    except ValueError as e:
        raise ValueError(f"{node.where}: {e}") from e
    rescales: tuple[Rescale, ...] = ()
    if not isinstance(grid, Coded):
        rescales = (
            by_dyadic(_factor(math.ldexp(1 / grid.scale, -functions.SOFTMAX_BITS)), node.where),
        )
    return IntegerSoftmax(
        **_fields(node, grid), rescales=rescales, exponential=exponential, direct=direct
    )


def gelu(node: Gelu, grids: Grids, shift: bool) -> IntegerTable:
    """As a table: of ShiftGELU's results, or of GELU's, rounded to the grid."""
    before, grid = grids[node.inputs[0]], grids[node.name]
    if before.bits > _TABLE_BITS:
        raise ValueError(
            f"{node.where}: a table is of {_TABLE_BITS} bits at most, its input has {before.bits}"
        )
    q = torch.arange(before.least, before.most + 1, dtype=torch.int64, device="cpu")
    if shift:
        y, scale = functions.shift_gelu(before.integers(q), before.scale)
        rescale = by_dyadic(_factor(scale / grid.scale), node.where)
        table = (rescale.apply(y, -1) + grid.zero).clamp(grid.least, grid.most)
    else:
        table = grid.quantize(node.compute(before.dequantize(q))).long()
    return IntegerTable(**_fields(node, grid), table=table)


def layer_norm(node: LayerNorm, grids: Grids) -> IntegerLayerNorm:
    """In integers.

    Raises:
        ValueError: a result may overflow int32.
    """
    before, grid = grids[node.inputs[0]], grids[node.name]
    width = node.shape[-1]
    lift = functions.norm_lift(before.span, width)
    eps = round(width * node.eps / math.ldexp(before.scale, -lift) ** 2)
    if eps > INT32_MAX // 2:
        raise ValueError(
            f"{node.where}: eps {node.eps} is {eps} steps of the sum of squares, which overflows int32"
        )
    step = math.ldexp(grid.scale, -_BIAS_BITS)
    factor = node.weight.abs() * math.sqrt(width) / step
    bias = round_by(node.bias / step, ROUNDING)
    check_sums(factor + bias.abs() + (1 << _BIAS_BITS), node.where)
    return IntegerLayerNorm(
        **_fields(node, grid),
        lift=lift,
        eps=eps,
        signs=torch.where(node.weight < 0, -1, 1),
        bias=bias.long(),
        rescales=(by_dyadic(factor / 2**functions.NORM_BITS, node.where),),
        out=power_of_two(
            torch.tensor(_BIAS_BITS, dtype=torch.int64, device="cpu"), "nearest", node.where
        ),
    )


def constant(node: Constant, grids: Grids) -> IntegerConstant:
    """Its integers."""
    grid = grids[node.name]
    return IntegerConstant(**_fields(node, grid), weight=grid.quantize(node.value).long())


def copy(node: Requantize | Scale, grids: Grids) -> IntegerCopy:
    """The same integers for a Scale, those of its own grid for a Requantize."""
    before, grid = grids[node.inputs[0]], grids[node.name]
    if isinstance(node, Scale):
        return IntegerCopy(**_fields(node, grid))
    rescale = by_dyadic(_factor(before.scale / grid.scale), node.where)
    return IntegerCopy(**_fields(node, grid), rescales=(rescale,))
