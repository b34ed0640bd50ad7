"""Where the results of a network lie in one static array: those that are needed at the same time do not overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.integer import IntegerGraph
from lowbit.integer.execution import IntegerNode
from lowbit.integer.graph import Clamp, Reshape


@dataclass(frozen=True)
class Arena:
    """Places of results.

    Attributes:
        size: of the array, in values.
        offsets: of the results that lie in it, by name.
        roots: for each result the one whose memory it shares, which is its own name, that of a node before it, or of
            the input.
    """

    size: int
    offsets: Mapping[str, int]
    roots: Mapping[str, str]


def plan(graph: IntegerGraph) -> Arena:
    """Largest first, each at the least offset where it overlaps nothing that lives with it (the greedy planner of
    TFLite-Micro). A reshape has the memory of what it takes, and so has a clamp that is its last reader. The input
    and the output of the network lie where the caller says.
    """
    last = _last_uses(graph.nodes)
    roots = {graph.input: graph.input}
    for i, n in enumerate(graph.nodes):
        source = n.node.inputs[0]
        shared = isinstance(n.node, Reshape) or (
            isinstance(n.node, Clamp)
            and roots[source] != graph.input
            and _is_last(graph.nodes, roots, source, i)
        )
        roots[n.node.name] = roots[source] if shared else n.node.name
    sizes: dict[str, int] = {}
    births: dict[str, int] = {}
    deaths: dict[str, int] = {}
    for i, n in enumerate(graph.nodes):
        root = roots[n.node.name]
        sizes[root] = math.prod(n.node.shape)
        births.setdefault(root, i)
        deaths[root] = max(deaths.get(root, i), last.get(n.node.name, i))
    outside = {graph.input, roots[graph.output]}
    offsets: dict[str, int] = {}
    for name in sorted(sizes.keys() - outside, key=lambda name: (-sizes[name], births[name])):
        beside = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if births[other] <= deaths[name] and births[name] <= deaths[other]
        )
        offset = 0
        for start, end in beside:
            if offset + sizes[name] <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    size = max((offsets[name] + sizes[name] for name in offsets), default=0)
    return Arena(size, offsets, roots)


def _last_uses(nodes: tuple[IntegerNode, ...]) -> dict[str, int]:
    """The last node that reads a result."""
    return {name: i for i, n in enumerate(nodes) for name in n.node.inputs}


def _is_last(
    nodes: tuple[IntegerNode, ...], roots: Mapping[str, str], name: str, place: int
) -> bool:
    """Whether no node behind `place` reads the memory of `name`, which is known up to there."""
    sharing = {other for other, root in roots.items() if root == roots[name]}
    return all(sharing.isdisjoint(n.node.inputs) for n in nodes[place + 1 :])
