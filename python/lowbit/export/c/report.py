"""What an exported network costs on a microcontroller: bytes, multiply-adds, and cycles by a simple model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.integer import IntegerGraph
from lowbit.integer.execution import IntegerNode
from lowbit.integer.graph import Conv, Pool, Reshape, Weighted

# Instructions of a Cortex-M4 for a multiply-add: of a linear, of a convolution whose kernel has one element, one row or
# more rows, and what codes add. Counted by an emulator that counts instructions, on layers of common sizes.
_PER_MAC_LINEAR = 5.0
_PER_MAC_CONV = (6.0, 9.0, 18.0)
_PER_MAC_CODE = 11.0
# For a result of layers, for one of the other kernels, and for an element that a window of a pool reads.
_PER_RESULT = {"qmn": 20.0, "tflite": 50.0}
_PER_ELEMENT = {"qmn": 7.0, "tflite": 34.0}
_PER_WINDOW = 6.0
# Loads take two cycles, taken branches two or three.
_CYCLES_PER_INSTRUCTION = 1.4


@dataclass
class CExport:
    """What `export_c` wrote.

    Attributes:
        path: the folder.
        scheme, bits: of the integers.
        flash_bytes: of the constant arrays; code comes on top.
        ram_bytes: of the static arena; input, output and stack come on top.
        macs: multiply-adds for one sample.
        cycles: an estimate for a Cortex-M4 (see `cycles_of`).
        error: the root mean square of the difference to the real network over that of the real network, on the
            calibration inputs.
        layers: kind of each node that has weights and how they are stored, by its module's path.
    """

    path: Path
    scheme: str
    bits: int
    flash_bytes: int
    ram_bytes: int
    macs: int
    cycles: int
    error: float
    layers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.scheme} in {self.bits} bits, flash {self.flash_bytes} bytes of constants, RAM {self.ram_bytes} "
            f"bytes of arena, {self.macs} multiply-adds, about {self.cycles} cycles of a Cortex-M4, error "
            f"{self.error:.2%} of the real network's output"
        )


def macs_of(graph: IntegerGraph) -> int:
    """Multiply-adds for one sample."""
    return sum(n.node.macs for n in graph.nodes if isinstance(n.node, Weighted))


def cycles_of(graph: IntegerGraph) -> int:
    """An estimate of cycles for one sample on a Cortex-M4, without wait states of its flash: instructions of each
    kernel for gcc -O2, as counted in an emulator, times the cycles that one takes by the core's manual. It has not been
    compared with a clock.
    """
    return round(sum(_instructions(n, graph.scheme) for n in graph.nodes) * _CYCLES_PER_INSTRUCTION)


def stored_as(n: IntegerNode) -> str:
    """How a node's weights are stored, in words."""
    kind = type(n.node).__name__.lower()
    steps = "channel" if n.rescales[0].shift.numel() > 1 else "tensor"
    how = f"int{n.grid.bits}" if n.codebook is None else f"{n.codebook.bits}-bit codes"
    return f"{kind}, {how}, a scale per {steps}"


def _instructions(n: IntegerNode, scheme: str) -> float:
    node = n.node
    count = math.prod(node.shape)
    if isinstance(node, Reshape):
        return 0.0
    if isinstance(node, Pool):
        return count * math.prod(node.window.size) * _PER_WINDOW
    if not isinstance(node, Weighted):
        return count * _PER_ELEMENT[scheme]
    per_mac = _PER_MAC_LINEAR
    if isinstance(node, Conv):
        rows, columns = node.window.size
        per_mac = _PER_MAC_CONV[2 if rows > 1 else int(columns > 1)]
    if n.codebook is not None:
        per_mac += _PER_MAC_CODE
    return node.macs * per_mac + count * _PER_RESULT[scheme]
