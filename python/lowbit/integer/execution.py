"""Graphs of integers and what they compute, exactly: the definition that exported C follows bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.integer.graph import SAME_SCALE, Add, Concat, Node, Pool, Weighted
from lowbit.integer.rescaling import Grid, Rescale, check_sums, divide


@dataclass(frozen=True)
class Codebook:
    """A weight as codes of a table.

    Attributes:
        bits: of a code, 2 to 4.
        table: (2^bits,) int64, integers as dense weights hold.
        codes: uint8, of the weight's shape.
    """

    bits: int
    table: Tensor
    codes: Tensor


@dataclass(frozen=True, kw_only=True)
class IntegerNode:
    """A node with its integers.

    Attributes:
        node: its geometry, and its weights as real numbers.
        grid: of its result.
        low, high: the result is clamped to these integers.
        weight: int64 of the node's shape, values of the grid's bits; None where there is none.
        bias: (O,) int64 with values of int32, on the grid of the sums, zero points folded in.
        codebook: the weight as codes, if it is stored so.
        rescales: sums to the result; for an add and a concatenation one an input, before which comes `lift`.
        out: for an add, sums to the result.
        lift: bits by which inputs of an add are multiplied first.
        rounding: of means.
    """

    node: Node
    grid: Grid
    low: int
    high: int
    rounding: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    codebook: Codebook | None = None
    rescales: tuple[Rescale, ...] = ()
    out: Rescale | None = None
    lift: int = 0

    def compute(self, inputs: list[Tensor], grids: list[Grid]) -> Tensor:
        """The result (batch, *shape) int64 of integers on these grids."""
        node, zero = self.node, self.grid.zero
        if isinstance(node, Weighted):
            assert self.weight is not None
            assert self.bias is not None
            x = grids[0].operand(inputs[0])
            sums = node.sums(x, self.weight, self.bias, grids[0].zero)
            y = self.rescales[0].apply(sums, node.channel_dim) + zero
        elif isinstance(node, Add):
            assert self.out is not None
            parts = [
                r.apply(g.integers(q) << self.lift, 0)
                for q, g, r in zip(inputs, grids, self.rescales, strict=True)
            ]
            y = self.out.apply(parts[0] + parts[1], -1) + zero
        elif isinstance(node, Concat):
            rescaled = [
                (r.apply(g.integers(q), 0) + zero).clamp(self.low, self.high)
                for q, g, r in zip(inputs, grids, self.rescales, strict=True)
            ]
            y = torch.cat(rescaled, node.axis + 1)
        elif isinstance(node, Pool):
            y = self._pool(node, inputs[0])
        else:
            y = node.compute(inputs[0])
        return self.bounded(y).reshape(-1, *node.shape)

    def bounded(self, y: Tensor) -> Tensor:
        """y, clamped as the result is."""
        return y.clamp(self.low, self.high)

    def _pool(self, node: Pool, q: Tensor) -> Tensor:
        if not node.mean:
            return node.parts(q, self.grid.least).amax(0)
        counts = node.counts()
        # Padding is 0 as a real number; where it does not count, it adds nothing.
        fill = self.grid.zero if node.count_padding else 0
        return divide(node.parts(q, fill).sum(0), counts, self.rounding)


@dataclass(frozen=True)
class IntegerGraph:
    """A network of integers.

    Attributes:
        scheme: "qmn", "tflite", or a method of `quantize_transformer`.
        input: the name of what it takes.
        shape: of one sample of it.
        input_grid: of it.
        nodes: in the order in which they run.
        output: the name of the node whose result is the network's.
    """

    scheme: str
    input: str
    shape: tuple[int, ...]
    input_grid: Grid
    nodes: tuple[IntegerNode, ...]
    output: str

    @property
    def bits(self) -> int:
        """Of an activation."""
        return self.input_grid.bits

    @property
    def grids(self) -> Mapping[str, Grid]:
        """The grid of every result and of the input."""
        return {self.input: self.input_grid, **{n.node.name: n.grid for n in self.nodes}}

    def quantize(self, x: Tensor) -> Tensor:
        """The integers that the network takes for real inputs (batch, *shape)."""
        if x.dim() < 2 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (batch, {self.shape}), got {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite, it has NaN or infinity")
        return self.input_grid.quantize(x)

    def run(self, q: Tensor) -> dict[str, Tensor]:
        """All results, by name, int8 or int16: q is (batch, *shape) of that dtype, as `quantize` gives it."""
        if q.dtype != self.input_grid.dtype or q.dim() < 2 or tuple(q.shape[1:]) != self.shape:
            raise ValueError(
                f"q must be {self.input_grid.dtype} of shape (batch, {self.shape}), got {q.dtype} of {tuple(q.shape)}"
            )
        grids, results = self.grids, {self.input: q}
        for n in self.nodes:
            inputs = [results[name].long() for name in n.node.inputs]
            y = n.compute(inputs, [grids[name] for name in n.node.inputs])
            results[n.node.name] = y.to(n.grid.dtype)
        return results

    def __call__(self, x: Tensor) -> Tensor:
        """The network's result for real inputs (batch, *shape) as real numbers, float64."""
        result = self.run(self.quantize(x))[self.output]
        return self.grids[self.output].dequantize(result)


def clamps(node: Node, grid: Grid) -> tuple[int, int]:
    """A node's clamp in integers."""
    if node.low == -math.inf and node.high == math.inf:
        return grid.least, grid.most
    low, high = (
        int(grid.quantize(torch.tensor(v, dtype=torch.float64, device="cpu")))
        for v in (node.low, node.high)
    )
    return low, high


def same_scale(node: Node, grid: Grid, rounding: str) -> IntegerNode:
    """A node whose result is on the grid of what it takes."""
    if not isinstance(node, SAME_SCALE):
        raise NotImplementedError(f"{node.where}: {type(node).__name__} has no integer form")
    if isinstance(node, Pool) and node.mean:
        check_sums(math.prod(node.window.size) * (1 - grid.least), node.where)
    low, high = clamps(node, grid)
    return IntegerNode(node=node, grid=grid, low=low, high=high, rounding=rounding)
