"""The C text of a network: its constants, and the calls that run it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.export.c.arena import Arena
from lowbit.formats import FORMATS
from lowbit.integer import IntegerGraph
from lowbit.integer.execution import IntegerNode
from lowbit.integer.graph import (
    Add,
    Clamp,
    Concat,
    Conv,
    Linear,
    Pool,
    Reshape,
    Weighted,
    Window,
    planes,
)
from lowbit.integer.rescaling import ROUNDINGS, Grid, Rescale
from lowbit.packing import pack_codes

_WIDTH = 112
_TYPES = {8: "int8_t", 16: "int16_t"}


@dataclass
class Source:
    """Parts of the text.

    Attributes:
        constants: declarations of arrays and of layers.
        calls: statements of model_run.
        flash: bytes of the arrays.
    """

    constants: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    flash: int = 0

    def array(self, type: str, name: str, values: Tensor | Sequence[int]) -> str:
        """Declares a constant array; its name."""
        numbers = torch.as_tensor(values, dtype=torch.int64, device="cpu").flatten().tolist()
        self.constants.append(array(f"static const {type} {name}", numbers))
        self.flash += len(numbers) * int(type.removeprefix("u")[3:].removesuffix("_t")) // 8
        return name


def array(declaration: str, numbers: Iterable[int]) -> str:
    """An array with its values, in lines."""
    values = list(numbers)
    lines, line = [], " "
    for value in values:
        # The least int32 is no literal of C: it is a minus before one that is too large.
        text = "(-2147483647 - 1)," if value == -(2**31) else f"{value},"
        if len(line) + len(text) >= _WIDTH:
            lines.append(line)
            line = " "
        line += f" {text}"
    return "\n".join([f"{declaration}[{len(values)}] = {{", *lines, line, "};"])


def in_comment(text: str) -> str:
    """A name of the user's in a comment: nothing in it ends the comment or the line."""
    return re.sub(r"[^\w.]", "_", text, flags=re.ASCII)


def weights_h(graph: IntegerGraph, source: Source) -> str:
    """The header of constants."""
    rounding = ROUNDINGS.index(graph.input_grid.rounding)
    return "\n".join(
        [
            "// Constants of the network: weights, factors and layers. All of it is const.",
            "#ifndef MODEL_WEIGHTS_H",
            "#define MODEL_WEIGHTS_H",
            "",
            f"#define MODEL_BITS {graph.bits}",
            f"#define MODEL_DYADIC {int(graph.scheme == 'tflite')}",
            f"#define MODEL_ROUNDING {rounding}",
            '#include "kernels.h"',
            "",
            *source.constants,
            "",
            "#endif",
            "",
        ]
    )


def model_h(graph: IntegerGraph, arena: Arena) -> str:
    """The header for the program that calls the network."""
    out, type = graph.grids[graph.output], _TYPES[graph.bits]
    shapes = [node_shape(graph, name) for name in (graph.input, graph.output)]
    lines = [
        "// The network: int8_t or int16_t in and out, each real = scale * (integer - zero).",
        "#ifndef MODEL_H",
        "#define MODEL_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
    ]
    for name, grid, shape in zip(("INPUT", "OUTPUT"), (graph.input_grid, out), shapes, strict=True):
        lines += [
            f"// {' x '.join(map(str, shape))}, in the order of torch.",
            f"#define MODEL_{name}_SIZE {math.prod(shape)}",
            f"#define MODEL_{name}_SCALE {grid.scale!r}",
            f"#define MODEL_{name}_ZERO ({grid.zero})",
        ]
    lines += [
        "// Bytes of the static array that intermediate results lie in.",
        f"#define MODEL_ARENA_BYTES {arena.size * graph.bits // 8}",
        f"#define MODEL_NODES {len(graph.nodes)}",
        "",
        f"void model_run(const {type} *input, {type} *output);",
        "",
        "#ifdef MODEL_TRACE",
        "// Given by the caller: gets the result of every node, when it is there.",
        f"void model_trace(int node, const {type} *values, size_t count);",
        "#endif",
        "",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def model_c(graph: IntegerGraph, arena: Arena, source: Source) -> str:
    """The function."""
    type = _TYPES[graph.bits]
    memory = [f"static model_value arena[{arena.size}];", ""] if arena.size else []
    return "\n".join(
        [
            "// Runs the network. It keeps no state between calls, but its arena is static: one call at a time.",
            '#include "model.h"',
            "",
            '#include "weights.h"',
            "",
            *memory,
            "#ifdef MODEL_TRACE",
            "#define TRACE(node, values, count) model_trace(node, values, count)",
            "#else",
            "#define TRACE(node, values, count)",
            "#endif",
            "",
            f"void model_run(const {type} *input, {type} *output) {{",
            *(f"  {call}" for call in source.calls),
            "}",
            "",
        ]
    )


def node_shape(graph: IntegerGraph, name: str) -> tuple[int, ...]:
    """The shape of a result or of the input, without a batch."""
    return next((n.node.shape for n in graph.nodes if n.node.name == name), graph.shape)


def write(graph: IntegerGraph, arena: Arena) -> Source:
    """All layers and their calls."""
    source = Source()
    grids = graph.grids

    def place(name: str) -> str:
        root = arena.roots[name]
        if root == graph.input:
            return "input"
        return f"arena + {arena.offsets[root]}" if root in arena.offsets else "output"

    for i, n in enumerate(graph.nodes):
        node = n.node
        inputs = [place(name) for name in node.inputs]
        before = [grids[name] for name in node.inputs]
        y, count = place(node.name), math.prod(node.shape)
        source.calls.append(f"// {in_comment(node.path or 'model')}: {type(node).__name__}")
        if isinstance(node, Weighted):
            bits = 0 if n.codebook is None else n.codebook.bits
            kind = _linear(source, n) if isinstance(node, Linear) else _conv(source, n, before[0])
            source.calls.append(f"model_run_{kind}(&{node.name}, {bits}, {inputs[0]}, {y});")
        elif isinstance(node, Pool):
            _pool(source, n, node)
            source.calls.append(
                f"model_run_pool(&{node.name}, {int(node.mean)}, {inputs[0]}, {y});"
            )
        elif isinstance(node, Add):
            _add(source, n, before)
            source.calls.append(f"model_run_add(&{node.name}, {inputs[0]}, {inputs[1]}, {y});")
        elif isinstance(node, Concat):
            for call in _concat(source, n, node, before, graph):
                source.calls.append(call.format(x=inputs, y=y))
        elif isinstance(node, Clamp):
            source.calls.append(f"model_run_clamp({count}, {n.low}, {n.high}, {inputs[0]}, {y});")
        elif not isinstance(node, Reshape):
            raise NotImplementedError(f"{node.where}: {type(node).__name__} has no C form")
        source.calls.append(f"TRACE({i}, {y}, {count});")
    if arena.roots[graph.output] == graph.input:
        raise ValueError("the network must compute something, it returns its input")
    return source


def _factor(source: Source, name: str, rescale: Rescale) -> str:
    shifts = source.array("int8_t", f"{name}_shifts", rescale.shift)
    multipliers = "NULL"
    if rescale.multiplier is not None:
        multipliers = source.array("int32_t", f"{name}_multipliers", rescale.multiplier)
    return f"{{{multipliers}, {shifts}, {int(rescale.shift.numel() > 1)}}}"


def _range(n: IntegerNode) -> str:
    return f"{{{n.grid.zero}, {n.low}, {n.high}}}"


def _layer(source: Source, kind: str, name: str, fields: Sequence[object]) -> None:
    text = ",\n    ".join(str(f) for f in fields)
    source.constants.append(f"static const {kind} {name} = {{\n    {text},\n}};")


def _weights(source: Source, n: IntegerNode) -> list[str]:
    """The fields of weights, codes, biases, factor and range."""
    name, type = n.node.name, _TYPES[n.grid.bits]
    assert n.weight is not None
    assert n.bias is not None
    if n.codebook is None:
        weights, codes = source.array(type, f"{name}_weights", n.weight), "NULL"
    else:
        weights = source.array(type, f"{name}_table", n.codebook.table)
        stream = pack_codes(
            n.codebook.codes.reshape(1, -1), FORMATS[f"kmeans{n.codebook.bits}"]
        ).flatten()
        # The decoder reads a byte behind the last code.
        codes = source.array("uint8_t", f"{name}_codes", [*stream.tolist(), 0])
    biases = source.array("int32_t", f"{name}_biases", n.bias)
    return [weights, codes, biases, _factor(source, name, n.rescales[0]), _range(n)]


def _linear(source: Source, n: IntegerNode) -> str:
    node = n.node
    assert isinstance(node, Linear)
    outputs, inputs = node.weight.shape
    rows = math.prod(node.shape[:-1])
    fields = [f"{rows}, {inputs}, {outputs}", *_weights(source, n)]
    _layer(source, "model_linear", node.name, fields)
    return "linear"


def _window(window: Window) -> str:
    pairs = (window.size, window.stride, window.padding, window.dilation)
    return ", ".join(f"{a}, {b}" for a, b in pairs)


def _conv(source: Source, n: IntegerNode, before: Grid) -> str:
    node = n.node
    assert isinstance(node, Conv)
    fields = [
        ", ".join(map(str, planes(node.in_shape))),
        ", ".join(map(str, planes(node.shape))),
        _window(node.window),
        f"{node.groups}, {before.zero}",
        *_weights(source, n),
    ]
    _layer(source, "model_conv", node.name, fields)
    return "conv"


def _pool(source: Source, n: IntegerNode, node: Pool) -> None:
    sizes = (*planes(node.in_shape), *planes(node.shape)[1:])
    fields = [
        ", ".join(map(str, sizes)),
        _window(node.window),
        f"{n.grid.zero}, {int(node.count_padding)}",
    ]
    _layer(source, "model_pool", node.name, fields)


def _add(source: Source, n: IntegerNode, before: Sequence[Grid]) -> None:
    name = n.node.name
    assert n.out is not None
    factors = [_factor(source, f"{name}_factor{i}", r) for i, r in enumerate((*n.rescales, n.out))]
    zeros = ", ".join(str(g.zero) for g in before)
    fields = [f"{math.prod(n.node.shape)}, {n.lift}", zeros, *factors, _range(n)]
    _layer(source, "model_add", name, fields)


def _concat(
    source: Source, n: IntegerNode, node: Concat, before: Sequence[Grid], graph: IntegerGraph
) -> list[str]:
    outer = math.prod(node.shape[: node.axis])
    stride, offset, calls = math.prod(node.shape[node.axis :]), 0, []
    for i, (name, grid) in enumerate(zip(node.inputs, before, strict=True)):
        block = math.prod(node_shape(graph, name)[node.axis :])
        layer = f"{node.name}_part{i}"
        factor = _factor(source, layer, n.rescales[i])
        fields = [f"{outer}, {block}, {stride}, {grid.zero}", factor, _range(n)]
        _layer(source, "model_copy", layer, fields)
        calls.append(f"model_run_copy(&{layer}, {{x[{i}]}}, {{y}} + {offset});")
        offset += block
    return calls


def checksum(values: Tensor) -> int:
    """FNV-1a in 32 bits over the bytes of int8 or int16 values, low bytes first."""
    found = 2166136261
    for byte in (
        values.contiguous().numpy().astype(values.numpy().dtype.newbyteorder("<")).tobytes()
    ):
        found = (found ^ byte) * 16777619 & 0xFFFFFFFF
    return found
