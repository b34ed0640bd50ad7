"""BatchNorm becomes part of the weights before it, and a ReLU part of the node whose result it takes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from lowbit.integer.graph import Add, Clamp, Conv, Graph, Node, Weighted, Window


@dataclass(frozen=True, kw_only=True)
class Norm(Node):
    """x * factor + offset by channel, the first dimension: a BatchNorm in eval mode, both (C,) float64."""

    factor: Tensor
    offset: Tensor

    def compute(self, *inputs: Tensor) -> Tensor:
        """As torch.nn.functional.batch_norm."""
        view = (-1, *(1 for _ in self.shape[1:]))
        return inputs[0] * self.factor.reshape(view) + self.offset.reshape(view)


def fold(graph: Graph) -> Graph:
    """The same network without norms: into the weights before one, or a depthwise convolution of size 1 where
    something else is before it. Results are the same but for the rounding of float64.
    """
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    uses[graph.output] += 1
    made: dict[str, Node] = {}
    # What a name of the graph is called now.
    names: dict[str, str] = {}
    for node in graph.nodes:
        inputs = tuple(names.get(name, name) for name in node.inputs)
        before = made.get(inputs[0])
        alone = uses[node.inputs[0]] == 1
        joined = _join(before, node) if before is not None and alone else None
        if joined is not None:
            made[joined.name] = joined
            names[node.name] = joined.name
            continue
        node = dataclasses.replace(node, inputs=inputs)
        made[node.name] = _depthwise(node) if isinstance(node, Norm) else node
    return dataclasses.replace(
        graph, nodes=tuple(made.values()), output=names.get(graph.output, graph.output)
    )


def _join(before: Node, node: Node) -> Node | None:
    """Two nodes as one, if they can be."""
    open_ended = before.low == -before.high == float("-inf")
    if isinstance(node, Norm) and isinstance(before, Weighted) and open_ended:
        if before.channel_dim != 1:
            # The norm's channels are rows of a linear there.
            return None
        view = (-1, *(1 for _ in before.weight.shape[1:]))
        weight = before.weight * node.factor.reshape(view)
        bias = before.bias * node.factor + node.offset
        return dataclasses.replace(before, weight=weight, bias=bias)
    if isinstance(node, Clamp) and isinstance(before, (Weighted, Add, Clamp)):
        low, high = max(before.low, node.low), min(before.high, node.high)
        return dataclasses.replace(before, low=low, high=high)
    return None


def _depthwise(node: Norm) -> Conv:
    window = Window(size=(1, 1), stride=(1, 1), padding=(0, 0))
    return Conv(
        name=node.name,
        path=node.path,
        inputs=node.inputs,
        shape=node.shape,
        weight=node.factor.reshape(-1, 1, 1, 1),
        bias=node.offset,
        window=window,
        groups=node.factor.numel(),
        in_shape=node.shape,
    )
