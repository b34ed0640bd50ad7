"""The int8 scheme of TFLite-Micro: activations with a zero point per tensor, symmetric weights per channel.

Arithmetic is that of TFLite's reference kernels: gemmlowp's multipliers, an add on inputs lifted by 20 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.integer.calibration import Ranges, range_of
from lowbit.integer.execution import IntegerGraph, IntegerNode, clamps, same_scale
from lowbit.integer.graph import SAME_SCALE, Add, Concat, Graph, Node, Weighted
from lowbit.integer.rescaling import Grid, by_dyadic, check_sums, round_by
from lowbit.integer.weights import integers

ROUNDING = "away"
LIFT = 20


def quantize_tflite(graph: Graph, ranges: Ranges, *, codebook: int | None = None) -> IntegerGraph:
    """A network in int8: real = scale * (integer - zero).

    An activation's range holds 0 and takes 255 steps; a weight's channel has max / 127; a bias is int32 with the
    scales of input and weight, into which the zero point of the input is folded. The step of a channel whose bias
    would overflow is larger, as TFLite's converter has it.

    Args:
        graph: from `trace`.
        ranges: from `calibrate`.
        codebook: store weights as codes of 2, 3 or 4 bits (see `weights.integers`).

    Raises:
        ValueError: a tensor is not calibrated, or sums of a layer may overflow int32.

    Example:
        >>> graph = trace(program)
        >>> quantize_tflite(graph, calibrate(graph, inputs))(x)
    """
    input_grid = _grid(range_of(ranges, graph.input, None))
    grids = {graph.input: input_grid}
    made = []
    for node in graph.nodes:
        if isinstance(node, SAME_SCALE):
            grids[node.name] = grids[node.inputs[0]]
            made.append(same_scale(node, grids[node.name], ROUNDING))
            continue
        grids[node.name] = _grid(range_of(ranges, node.name, node))
        if isinstance(node, Weighted):
            made.append(weighted(node, grids, codebook=codebook))
        else:
            made.append(join(node, grids, LIFT))
    return IntegerGraph("tflite", graph.input, graph.shape, input_grid, tuple(made), graph.output)


def _grid(ends: tuple[float, float]) -> Grid:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-128 - low / scale)
    return Grid(scale, max(-128, min(127, zero)), 8, ROUNDING)


def weight_steps(node: Weighted, bits: int) -> Tensor:
    """The step of each channel's weight, (O,): its largest absolute value is 2^(bits - 1) - 1 steps."""
    return node.weight.abs().flatten(1).amax(1) / ((1 << (bits - 1)) - 1)


def weighted(
    node: Weighted,
    grids: Mapping[str, Grid],
    *,
    bits: int = 8,
    steps: Tensor | None = None,
    codebook: int | None = None,
) -> IntegerNode:
    """A node with a weight of `bits`, of these steps (O,) float64 or those of `weight_steps`."""
    before, grid = grids[node.inputs[0]], grids[node.name]
    steps = weight_steps(node, bits) if steps is None else steps
    # A bias of 2^29 steps leaves room for sums.
    steps = torch.maximum(steps, node.bias.abs() / (before.scale * 2**29))
    steps = torch.where(steps > 0, steps, 1.0)
    weight, codes = integers(node, steps, bits, ROUNDING, codebook)
    bias = round_by(node.bias / (steps * before.scale), ROUNDING).long()
    folded = bias - before.zero * weight.flatten(1).sum(1)
    check_sums(folded.abs() + weight.abs().flatten(1).sum(1) * before.bound, node.where)
    low, high = clamps(node, grid)
    return IntegerNode(
        node=node,
        grid=grid,
        low=low,
        high=high,
        rounding=ROUNDING,
        weight=weight,
        bias=folded,
        codebook=codes,
        rescales=(by_dyadic(steps * (before.scale / grid.scale), node.where),),
    )


def join(node: Node, grids: Mapping[str, Grid], lift: int) -> IntegerNode:
    """An add, whose inputs are lifted by so many bits, or a concatenation."""
    if not isinstance(node, (Add, Concat)):
        raise NotImplementedError(f"{node.where}: {type(node).__name__} has no integer form")
    grid = grids[node.name]
    scales = [grids[name].scale for name in node.inputs]
    is_add = isinstance(node, Add)
    # Both inputs of an add become numbers below half of the common scale, so that their sum fits.
    common = 2 * max(scales) if is_add else grid.scale
    factors = torch.tensor([s / common for s in scales], dtype=torch.float64, device="cpu")
    last = common / (math.ldexp(1, lift) * grid.steps)
    low, high = clamps(node, grid)
    return IntegerNode(
        node=node,
        grid=grid,
        low=low,
        high=high,
        rounding=ROUNDING,
        rescales=tuple(by_dyadic(factor, node.where) for factor in factors),
        out=by_dyadic(last, node.where) if is_add else None,
        lift=lift if is_add else 0,
    )
