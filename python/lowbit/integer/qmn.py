"""Fixed point Qm.n in 8 and 16 bits, as MicroAI and Qualia have it (arXiv 2105.13331): scales are powers of two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.integer.calibration import Ranges, range_of
from lowbit.integer.execution import IntegerGraph, IntegerNode, clamps, same_scale
from lowbit.integer.graph import SAME_SCALE, Add, Concat, Graph, Node, Weighted
from lowbit.integer.rescaling import (
    INT32_MAX,
    MAX_SHIFT,
    Grid,
    check_sums,
    power_of_two,
    round_by,
)
from lowbit.integer.weights import integers

GRANULARITIES = ("network", "layer", "filter")
ROUNDINGS = ("floor", "nearest")
# Q7.9, the paper's choice for 16 bits.
FRACTION_16 = 9
# What a layer may give up of its fraction, so that sums fit.
_MAX_GUARD = 48


@dataclass(frozen=True)
class _Setting:
    bits: int
    granularity: str
    rounding: str
    codebook: int | None


def quantize_qmn(
    graph: Graph,
    ranges: Ranges,
    *,
    bits: int = 8,
    granularity: str | None = None,
    rounding: str = "nearest",
    fraction: int | None = None,
    codebook: int | None = None,
) -> IntegerGraph:
    """A network in fixed point: integers of `bits`, a real number is an integer over 2^n.

    n is chosen by the largest absolute value as in the paper: bits - 1 - (floor(log2 max) + 1). Biases are int32 on
    the grid of the sums, where the paper keeps them in `bits`. A layer or filter whose sums could leave int32 at any
    input takes a smaller n for its weights, which matters for 16 bits.

    Args:
        graph: from `trace`.
        ranges: from `calibrate`.
        bits: 8 or 16.
        granularity: "network" has one n for everything; "layer" one for each activation and each weight; "filter"
            one for each output channel of a weight. None is "layer" for 8 bits and "network" for 16.
        rounding: "floor" or "nearest" (ties up), of everything: inputs, weights, sums.
        fraction: n of the network; None is 9 (Q7.9) for 16 bits, and the largest that holds all for 8 bits.
        codebook: store weights as codes of 2, 3 or 4 bits (see `weights.integers`).

    Raises:
        ValueError: an argument is none of these, a tensor is not calibrated, or sums of a layer may overflow int32
            (granularity "network").

    Example:
        >>> graph = trace(program)
        >>> quantize_qmn(graph, calibrate(graph, inputs), bits=16)(x)
    """
    granularity = granularity or ("layer" if bits == 8 else "network")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS} for qmn, got {rounding!r}")
    if fraction is not None and granularity != "network":
        raise ValueError(f"fraction is for granularity 'network', got {fraction}")
    setting = _Setting(bits, granularity, rounding, codebook)
    fractions = _fractions(graph, ranges, setting, fraction)
    input_grid = _grid(fractions[graph.input], setting)
    grids = {graph.input: input_grid}
    made = []
    for node in graph.nodes:
        if isinstance(node, SAME_SCALE):
            grids[node.name] = grids[node.inputs[0]]
            made.append(same_scale(node, grids[node.name], rounding))
            continue
        grids[node.name] = _grid(fractions[node.name], setting)
        make = _weighted if isinstance(node, Weighted) else _join
        made.append(make(node, grids, setting))
    return IntegerGraph("qmn", graph.input, graph.shape, input_grid, tuple(made), graph.output)


def fraction_bits(largest: float, bits: int) -> int:
    """n of Qm.n for numbers of at most this absolute value, which may be 0."""
    return bits - 1 - (math.frexp(largest)[1] if largest else 0)


def _fractions(
    graph: Graph, ranges: Ranges, setting: _Setting, fraction: int | None
) -> Mapping[str, int]:
    """n of every activation."""
    nodes: dict[str, Node | None] = {graph.input: None, **{n.name: n for n in graph.nodes}}
    largest = {
        name: max(map(abs, range_of(ranges, name, node)))
        for name, node in nodes.items()
        if not isinstance(node, SAME_SCALE)
    }
    if setting.granularity != "network":
        return {name: fraction_bits(value, setting.bits) for name, value in largest.items()}
    if fraction is None:
        weights = [float(n.weight.abs().max()) for n in graph.nodes if isinstance(n, Weighted)]
        most = max([*largest.values(), *weights])
        fraction = FRACTION_16 if setting.bits == 16 else fraction_bits(most, setting.bits)
    if not 0 <= fraction <= MAX_SHIFT:
        raise ValueError(f"fraction must be 0 to {MAX_SHIFT}, got {fraction}")
    return dict.fromkeys(nodes, fraction)


def _grid(fraction: int, setting: _Setting) -> Grid:
    return Grid(math.ldexp(1.0, -fraction), 0, setting.bits, setting.rounding)


def _fraction(grid: Grid) -> int:
    return 1 - math.frexp(grid.scale)[1]


def _weighted(node: Node, grids: Mapping[str, Grid], setting: _Setting) -> IntegerNode:
    assert isinstance(node, Weighted)
    before, grid = grids[node.inputs[0]], grids[node.name]
    if setting.granularity == "network":
        fraction = torch.tensor([_fraction(grid)], dtype=torch.int64, device="cpu")
        made, bound = _with_fraction(node, before, grid, fraction, setting)
        check_sums(bound, node.where)
        return made
    rows = node.weight.flatten(1) if setting.granularity == "filter" else node.weight.reshape(1, -1)
    exponents = torch.frexp(rows.abs().amax(1)).exponent.long()
    fraction = setting.bits - 1 - exponents
    # A filter of zeros has an n of its own choice, as one of 1 has.
    for _ in range(_MAX_GUARD):
        shift = _fraction(before) + fraction - _fraction(grid)
        fraction = fraction - (shift - MAX_SHIFT).clamp(min=0)
        made, bound = _with_fraction(node, before, grid, fraction, setting)
        bad = (bound > INT32_MAX).reshape(fraction.numel(), -1).any(1)
        if not bool(bad.any()):
            return made
        fraction = fraction - bad.long()
    check_sums(bound, node.where)
    raise AssertionError("no sum is out of range, and one is")


def _with_fraction(
    node: Weighted, before: Grid, grid: Grid, fraction: Tensor, setting: _Setting
) -> tuple[IntegerNode, Tensor]:
    """The node with n of its weights, (1,) or (O,), and the largest sum (O,) that an input can give."""
    n = fraction.to(torch.float64)
    steps = torch.exp2(-n)
    weight, codebook = integers(node, steps, setting.bits, setting.rounding, setting.codebook)
    bias = round_by(node.bias / (steps * before.scale), setting.rounding)
    rescale = power_of_two(
        _fraction(before) + fraction - _fraction(grid), setting.rounding, node.where
    )
    bound = bias.abs() + weight.abs().flatten(1).sum(1) * -before.least + rescale.half
    low, high = clamps(node, grid)
    made = IntegerNode(
        node=node,
        grid=grid,
        low=low,
        high=high,
        rounding=setting.rounding,
        weight=weight,
        bias=bias.long(),
        codebook=codebook,
        rescales=(rescale,),
    )
    return made, bound


def _join(node: Node, grids: Mapping[str, Grid], setting: _Setting) -> IntegerNode:
    """An add or a concatenation."""
    if not isinstance(node, (Add, Concat)):
        raise NotImplementedError(f"{node.where}: {type(node).__name__} has no integer form")
    grid = grids[node.name]
    fractions = [_fraction(grids[name]) for name in node.inputs]
    out = None
    # An add aligns what it takes to the finest of them.
    to = max(fractions) if isinstance(node, Add) else _fraction(grid)
    shifts = torch.tensor([n - to for n in fractions], dtype=torch.int64, device="cpu")
    rescales = tuple(power_of_two(s, setting.rounding, node.where) for s in shifts)
    if isinstance(node, Add):
        shift = torch.tensor([to - _fraction(grid)], dtype=torch.int64, device="cpu")
        out = power_of_two(shift, setting.rounding, node.where)
        check_sums((-grid.least << -shifts).sum() + out.half, node.where)
    low, high = clamps(node, grid)
    return IntegerNode(
        node=node,
        grid=grid,
        low=low,
        high=high,
        rounding=setting.rounding,
        rescales=rescales,
        out=out,
    )
