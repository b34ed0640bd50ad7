"""The ranges of a network's tensors, from inputs that are like those it will see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.integer.graph import Graph, Node

Ranges = Mapping[str, tuple[float, float]]
_BATCH = 64


def calibrate(graph: Graph, inputs: Tensor) -> dict[str, tuple[float, float]]:
    """The least and the largest value of the input and of every node's result.

    Args:
        graph: from `trace`.
        inputs: (samples, *shape of the network's input), of floating point.

    Raises:
        TypeError: inputs are no tensor of floating point.
        ValueError: their shape is another one, there are none, or one is NaN or infinite, or makes a result so.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs)
        raise TypeError(f"calibration inputs must be a tensor of floating point, got {found}")
    if inputs.dim() < 2 or inputs.shape[0] == 0 or tuple(inputs.shape[1:]) != graph.shape:
        raise ValueError(
            f"calibration inputs must have shape (samples, {', '.join(map(str, graph.shape))}), got "
            f"{tuple(inputs.shape)}"
        )
    bad = ~inputs.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"calibration inputs must be finite: sample {int(bad.nonzero()[0, 0])} has NaN or infinity"
        )
    ranges: dict[str, tuple[float, float]] = {}
    where = {node.name: node.where for node in graph.nodes}
    for part in inputs.detach().to("cpu").split(_BATCH):
        for name, y in graph.run(part).items():
            low, high = (float(v) for v in torch.aminmax(y))
            if not bool(y.isfinite().all()):
                raise ValueError(f"{where[name]}: calibration inputs give NaN or infinity there")
            before = ranges.get(name, (low, high))
            ranges[name] = min(low, before[0]), max(high, before[1])
    return ranges


def range_of(ranges: Ranges, name: str, node: Node | None) -> tuple[float, float]:
    """The range of a tensor; ValueError if it is not calibrated."""
    if name not in ranges:
        where = "the input" if node is None else node.where
        raise ValueError(f"{where}: tensor {name!r} is not calibrated: ranges lack it")
    return ranges[name]
