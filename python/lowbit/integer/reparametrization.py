"""RepQ-ViT (arXiv 2212.08254): a layer norm whose channels have ranges of their own, with one scale for all of them.

Each channel's scale over the mean of all, and the difference of zero points, move into the norm's weight and bias and
out again in the next linear: the network stays the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.integer.graph import Graph, Linear, Node
from lowbit.integer.transformer import LayerNorm
from lowbit.integer.uses import readers


def reparametrize(graph: Graph, results: Mapping[str, Tensor], bits: int) -> Graph:
    """The same network, where channels of layer norms before linears have one scale and one zero point.

    Args:
        graph: from `trace`.
        results: of calibration, by name: (samples, ..., K).
        bits: of an activation: asymmetric, from the least to the largest value of a channel.

    Returns:
        A graph whose results are the same to the rounding of float64. A norm that anything but linears reads stays.
    """
    made: dict[str, Node] = {node.name: node for node in graph.nodes}
    reads = readers(graph)
    for node in graph.nodes:
        linears = [r for r in reads[node.name] if isinstance(r, Linear)]
        read = len(linears) == len(reads[node.name]) > 0 and node.name != graph.output
        if not isinstance(node, LayerNorm) or not read:
            continue
        ratio, offset = _alignment(results[node.name].flatten(0, -2), bits)
        made[node.name] = dataclasses.replace(
            node, weight=node.weight / ratio, bias=node.bias / ratio + offset
        )
        for linear in linears:
            weight = linear.weight * ratio
            made[linear.name] = dataclasses.replace(
                linear, weight=weight, bias=linear.bias - weight @ offset
            )
    return dataclasses.replace(graph, nodes=tuple(made.values()))


def _alignment(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """r and c, (K,), for which y / r + c has one scale and zero point: y is (rows, K)."""
    low, high = y.amin(0), y.amax(0)
    scales = (high - low) / ((1 << bits) - 1)
    # A channel that is always the same keeps its scale.
    scales = torch.where(scales > 0, scales, scales.mean().clamp(min=torch.finfo(y.dtype).tiny))
    zeros = -low / scales
    scale, zero = scales.mean(), zeros.mean()
    return scales / scale, scale * (zeros - zero)
