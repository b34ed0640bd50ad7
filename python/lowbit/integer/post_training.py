"""Transformers in integers after training: plain scales, FQ-ViT, PTQ4ViT, RepQ-ViT and I-ViT."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lowbit.integer import coded, search, tflite, transformer_execution
from lowbit.integer.calibration import calibrate
from lowbit.integer.execution import IntegerGraph, IntegerNode, same_scale
from lowbit.integer.graph import SAME_SCALE, Add, Concat, Graph, Node, Weighted
from lowbit.integer.reparametrization import reparametrize
from lowbit.integer.rescaling import Grid
from lowbit.integer.transformer import (
    Constant,
    Gelu,
    LayerNorm,
    MatMul,
    Requantize,
    Scale,
    Softmax,
)
from lowbit.integer.uses import Bits, readers, split_uses, wanted

ROUNDING = tflite.ROUNDING
_BATCH = 64
# Bits where a method quantizes products alone: of what no product takes, and of what GELU does, a table of 4096.
_WIDE, _TABLE = 16, 12


@dataclass(frozen=True)
class Method:
    """What a method of a paper does.

    Attributes:
        everything: all results have `bits`, and not only what products take.
        softmax: the grid of attention maps: "uniform", "log2", "log_sqrt2" or "twin".
        twin: whether GELU's results have twin steps.
        factors: whether inputs of layer norms have power-of-two factors by channel.
        channels: whether channels of layer norms are aligned with each other (RepQ-ViT).
        searched: whether scales are searched (PTQ4ViT).
        shift: whether exponentials are I-ViT's, and GELU its ShiftGELU.
        symmetric: whether zero points are 0.
    """

    everything: bool = False
    softmax: str = "uniform"
    twin: bool = False
    factors: bool = False
    channels: bool = False
    searched: bool = False
    shift: bool = False
    symmetric: bool = False


METHODS = {
    "minmax": Method(everything=True),
    "fq_vit": Method(everything=True, softmax="log2", factors=True),
    "ptq4vit": Method(softmax="twin", twin=True, searched=True, symmetric=True),
    "repq_vit": Method(softmax="log_sqrt2", channels=True),
    "i_vit": Method(shift=True, symmetric=True),
}


class RangeGrid(Protocol):
    """What an observer gives: real = scale * (q - zero_point)."""

    scale: float
    zero_point: int


class Observer(Protocol):
    """Watches values and gives a grid; those of `lowbit.ptq.OBSERVERS` are such."""

    def update(self, x: Tensor) -> None:
        """Takes a batch."""

    def grid(self, bits: int = 8, symmetric: bool = True) -> RangeGrid:
        """The integers to quantize to."""
        ...


@dataclass(frozen=True)
class _Setting:
    method: Method
    bits: int
    weight_bits: int
    attention_bits: int
    observer: Callable[[], Observer] | None


def quantize_transformer(
    graph: Graph,
    inputs: Tensor,
    method: str = "minmax",
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    attention_bits: int | None = None,
    everything: bool | None = None,
    observer: Callable[[], Observer] | None = None,
) -> IntegerGraph:
    """A transformer in integers alone: softmax, GELU and layer norms, too.

    Weights are symmetric with a scale for each output channel, and factors are dyadic. Weights of the first and the
    last node with weights, the network's input, and its result have 8 bits or more, as in the papers.

    Args:
        graph: from `trace`.
        inputs: (samples, *shape), of floating point, for calibration. All results for them are held at once.
        method: "minmax", plain scales with all results in `bits`; "fq_vit", the same with Log-Int-Softmax and
            power-of-two factors before layer norms; "ptq4vit", twin steps behind softmax and GELU and scales that are
            searched by the loss; "repq_vit", aligned channels of layer norms and log-sqrt2 behind softmax; "i_vit",
            Shiftmax and ShiftGELU in 8 bits. The last three quantize what products take; what is added, normalized
            or taken by softmax has 16 bits, and what GELU takes 12.
        bits: 4 to 8, of activations.
        weight_bits: 2 to 8; None is `bits`.
        attention_bits: 4 to 8, of the results of softmax; None is `bits`.
        everything: whether all results have `bits`; None is as the method has it.
        observer: makes what finds the range of a result, as one of `lowbit.ptq.OBSERVERS`; None is the least and the
            largest value. Ranges of 16 bits, those of softmax, and of what is aligned or searched, are always these.

    Raises:
        TypeError, ValueError: an argument is none of these, inputs are not finite or of another shape, a result is
            not finite, or sums may overflow int32.
        NotImplementedError: a node has no integer form.

    Example:
        >>> graph = trace(torch.export.export(vit.eval(), (x,)))
        >>> quantize_transformer(graph, images, "repq_vit", bits=6)(x)
    """
    setting = _checked(method, bits, weight_bits, attention_bits, everything, observer)
    # Finds what is not finite, and names it.
    calibrate(graph, inputs)
    inputs = inputs.detach().to("cpu")
    wide = bits if setting.method.everything else _WIDE
    table = bits if setting.method.everything else _TABLE
    widths = Bits(bits, table, wide)
    with torch.no_grad():
        if setting.method.channels:
            graph = reparametrize(graph, graph.run(inputs), bits)
        graph = split_uses(graph, widths)
        plan = _Plan(graph, graph.run(inputs), setting, wanted(graph, widths))
        plan.choose()
        if setting.method.searched:
            plan.search(inputs[: search.SAMPLES])
        nodes = tuple(plan.made(node) for node in graph.nodes)
    return IntegerGraph(
        method, graph.input, graph.shape, plan.grids[graph.input], nodes, graph.output
    )


def _checked(
    method: str,
    bits: int,
    weight_bits: int | None,
    attention_bits: int | None,
    everything: bool | None,
    observer: Callable[[], Observer] | None,
) -> _Setting:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    weight_bits = bits if weight_bits is None else weight_bits
    attention_bits = bits if attention_bits is None else attention_bits
    for name, value, least in (
        ("bits", bits, 4),
        ("weight_bits", weight_bits, 2),
        ("attention_bits", attention_bits, 4),
    ):
        if not least <= value <= 8:
            raise ValueError(f"{name} must be {least} to 8, got {value}")
        if method == "i_vit" and value != 8:
            raise ValueError(f"{name} must be 8 for method i_vit, got {value}")
    made = METHODS[method]
    if everything is not None:
        made = replace(made, everything=everything)
    return _Setting(made, bits, weight_bits, attention_bits, observer)


class _Plan:
    """The grids of all results, and the steps of weights that are not plain."""

    def __init__(
        self, graph: Graph, results: dict[str, Tensor], setting: _Setting, widths: dict[str, int]
    ) -> None:
        self.graph, self.results, self.setting, self.widths = graph, results, setting, widths
        self.reads = readers(graph)
        self.grids: dict[str, Grid] = {}
        self.steps: dict[str, Tensor] = {}
        weights = [n.name for n in graph.nodes if isinstance(n, Weighted)]
        self.ends = {*weights[:1], *weights[-1:]}

    def weight_bits(self, node: Weighted) -> int:
        """Of a node."""
        return (
            max(8, self.setting.weight_bits) if node.name in self.ends else self.setting.weight_bits
        )

    def choose(self) -> None:
        """A grid for the input and every result."""
        self.grids[self.graph.input] = self._uniform(self.graph.input)
        for node in self.graph.nodes:
            self.grids[node.name] = self._grid(node)

    def _grid(self, node: Node) -> Grid:
        method = self.setting.method
        before = self.grids[node.inputs[0]]
        if isinstance(node, SAME_SCALE):
            return before
        if isinstance(node, Scale):
            return search.scaled(before, node.factor)
        if isinstance(node, Softmax) and method.softmax != "uniform":
            return self._attention(node)
        if isinstance(node, Gelu) and method.twin and self.widths[node.name] == self.setting.bits:
            top = max(float(self.results[node.name].max()), -coded.GELU_LEAST)
            return coded.twin_gelu(self.setting.bits, top / ((1 << (self.setting.bits - 1)) - 1))
        grid = self._uniform(node.name)
        if method.factors and isinstance(node, Add) and self._takes_factors(node):
            return coded.shifted(self.results[node.name], grid)
        return grid

    def _takes_factors(self, node: Node) -> bool:
        """Whether a layer norm reads a result, and nothing that needs one step for all channels."""
        takers = self.reads[node.name]
        whole = all(isinstance(r, (LayerNorm, Add)) for r in takers)
        clamped = node.low != -math.inf or node.high != math.inf
        return whole and not clamped and any(isinstance(r, LayerNorm) for r in takers)

    def _attention(self, node: Softmax) -> Grid:
        bits = self.setting.attention_bits
        # Sums over a row of products with up to 8 bits and a zero point.
        room = 22 - (node.shape[-1] - 1).bit_length()
        if room < 2:
            raise ValueError(
                f"{node.where}: sums over {node.shape[-1]} products would overflow int32 ({2**31 - 1})"
            )
        if self.setting.method.softmax == "twin":
            return coded.twin_softmax(bits, min(bits - 1, room - bits + 1))
        make = coded.log2 if self.setting.method.softmax == "log2" else coded.log_sqrt2
        return make(bits, room)

    def _uniform(self, name: str) -> Grid:
        bits = self.widths[name]
        node = next((n for n in self.graph.nodes if n.name == name), None)
        if isinstance(node, Softmax):
            bits = self.setting.attention_bits
        symmetric = self.setting.method.symmetric
        x = self.results[name]
        plain = bits > 8 or isinstance(node, Softmax) or self.setting.observer is None
        if not plain and not self.setting.method.searched and not self.setting.method.channels:
            assert self.setting.observer is not None
            seen = self.setting.observer()
            for part in x.split(_BATCH):
                seen.update(part)
            found = seen.grid(bits, symmetric)
            return Grid(found.scale, found.zero_point, bits, ROUNDING)
        low, high = (float(v) for v in torch.aminmax(x))
        return range_grid(low, high, bits, symmetric)

    def search(self, inputs: Tensor) -> None:
        """Grids of what products take, and steps of weights, by PTQ4ViT's search."""
        importance = search.sensitivity(self.graph, inputs)
        done: set[str] = set()
        for node in self.graph.nodes:
            if not isinstance(node, (Weighted, MatMul)):
                continue
            xs = [self.results[name][: len(inputs)] for name in node.inputs]
            grids = [self.grids[name] for name in node.inputs]
            weight = importance[node.name]
            if isinstance(node, Weighted):
                bits = self.weight_bits(node)
                base = tflite.weight_steps(node, bits)
                base = torch.where(base > 0, base, 1.0)
                found, steps = search.search_weighted(node, xs[0], weight, grids[0], base, bits)
                self.steps[node.name] = steps
                chosen = [found]
            else:
                chosen = search.search_matmul(node, xs, weight, grids)
            for name, old, new in zip(node.inputs, grids, chosen, strict=True):
                root = self._root(name)
                # What two products read has the scale of the first.
                if root not in done and old is not new:
                    self._set(root, self.grids[root], old, new)
                done.add(root)

    def _root(self, name: str) -> str:
        """The result that views show."""
        nodes = {n.name: n for n in self.graph.nodes}
        while name in nodes and isinstance(nodes[name], (*SAME_SCALE, Scale)):
            name = nodes[name].inputs[0]
        return name

    def _set(self, root: str, before: Grid, old: Grid, new: Grid) -> None:
        """Gives a result and its views another grid, of which a view with a scale showed `old`."""
        same = before is old
        self.grids[root] = new if same else search.scaled(before, new.scale / old.scale)
        for node in self.graph.nodes:
            if isinstance(node, (*SAME_SCALE, Scale)) and self._root(node.name) == root:
                self.grids[node.name] = self._grid(node)

    def made(self, node: Node) -> IntegerNode:
        """The node in integers."""
        grids = self.grids
        if isinstance(node, SAME_SCALE):
            return same_scale(node, grids[node.name], ROUNDING)
        if isinstance(node, Weighted):
            bits, steps = self.weight_bits(node), self.steps.get(node.name)
            return tflite.weighted(node, grids, bits=bits, steps=steps)
        if isinstance(node, (Add, Concat)):
            # Inputs have so many bits and one for their zero point; 30 leave room for a sum.
            largest = max(g.bound + abs(g.zero) for g in (grids[name] for name in node.inputs))
            return tflite.join(node, grids, min(tflite.LIFT, 30 - largest.bit_length()))
        if isinstance(node, MatMul):
            return transformer_execution.matmul(node, grids)
        if isinstance(node, Softmax):
            shift, log2 = self.setting.method.shift, self.setting.method.softmax == "log2"
            return transformer_execution.softmax(node, grids, shift, log2)
        if isinstance(node, Gelu):
            return transformer_execution.gelu(node, grids, self.setting.method.shift)
        if isinstance(node, LayerNorm):
            return transformer_execution.layer_norm(node, grids)
        if isinstance(node, Constant):
            return transformer_execution.constant(node, grids)
        if isinstance(node, (Requantize, Scale)):
            return transformer_execution.copy(node, grids)
        raise NotImplementedError(f"{node.where}: {type(node).__name__} has no integer form")


def range_grid(low: float, high: float, bits: int, symmetric: bool) -> Grid:
    """The grid of a range, which is widened to hold 0.

    Args:
        low, high: the least and the largest value.
        bits: of an integer.
        symmetric: the zero point is 0 and the largest absolute value 2^(bits - 1) - 1 steps.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    half = 1 << (bits - 1)
    if symmetric:
        return Grid(max(-low, high) / (half - 1) or 1.0, 0, bits, ROUNDING)
    scale = (high - low) / (2 * half - 1) or 1.0
    return Grid(scale, max(-half, min(half - 1, round(-half - low / scale))), bits, ROUNDING)
