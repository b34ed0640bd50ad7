"""What reads a result of a network, and how many bits it should have: few for products, more for everything else."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.integer.graph import SAME_SCALE, Conv, Graph, Linear, Node, Take
from lowbit.integer.transformer import Gelu, MatMul, Requantize, Scale

PRODUCTS = (Linear, Conv, MatMul)
# Nodes whose result has bits of what they take.
VIEWS = (*SAME_SCALE, Scale)


@dataclass(frozen=True)
class Bits:
    """Of activations.

    Attributes:
        product: of what products take.
        table: of what GELU takes.
        other: of what is added, normalized, what softmax takes, or the network's result.
    """

    product: int
    table: int
    other: int


def readers(graph: Graph) -> Mapping[str, list[Node]]:
    """The nodes that take each result."""
    found: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            found[name].append(node)
    return found


def wanted(graph: Graph, bits: Bits) -> dict[str, int]:
    """Bits of every result: the fewest that a reader wants, through views."""
    reads = readers(graph)
    found: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in found:
            found[name] = min(
                [_by(node, bits) or of(node.name) for node in reads[name]]
                + ([bits.other] if name == graph.output else []),
                default=bits.other,
            )
        return found[name]

    for node in reversed(graph.nodes):
        of(node.name)
    # An image has 8 bits, as the papers leave it.
    found[graph.input] = max(8, of(graph.input))
    return found


def _by(node: Node, bits: Bits) -> int | None:
    """What a reader wants; None for a view."""
    if isinstance(node, PRODUCTS):
        return bits.product
    if isinstance(node, Gelu):
        return bits.table
    return None if isinstance(node, VIEWS) else bits.other


def split_uses(graph: Graph, bits: Bits) -> Graph:
    """The same network with a Requantize before products whose input others read with more bits, and behind each part
    that is taken of a result for products, so that every part has a scale of its own.
    """
    if bits.product == bits.table == bits.other:
        return graph
    reads = readers(graph)
    narrow: dict[str, Node] = {}
    for node in graph.nodes:
        wants = [_wants(graph, reads, reader, bits) for reader in reads[node.name]]
        mixed = bits.product in wants and len(set(wants)) > 1
        part = isinstance(node, Take) and set(wants) == {bits.product}
        if (mixed or part) and bits.product < bits.other:
            narrow[node.name] = Requantize(
                name=f"{node.name}_narrow", path=node.path, inputs=(node.name,), shape=node.shape
            )
    nodes: list[Node] = []
    for node in graph.nodes:
        if _wants(graph, reads, node, bits) == bits.product:
            inputs = tuple(narrow[n].name if n in narrow else n for n in node.inputs)
            node = dataclasses.replace(node, inputs=inputs)
        nodes.append(node)
        if node.name in narrow:
            nodes.append(narrow[node.name])
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _wants(graph: Graph, reads: Mapping[str, list[Node]], reader: Node, bits: Bits) -> int:
    """What a reader wants, or those behind it where it is a view."""
    own = _by(reader, bits)
    if own is not None:
        return own
    behind = [_wants(graph, reads, node, bits) for node in reads[reader.name]]
    return min(behind + ([bits.other] if reader.name == graph.output else []), default=bits.other)
