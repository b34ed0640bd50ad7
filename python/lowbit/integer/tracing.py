"""From a `torch.export` program to a graph: which aten ops have an integer form, and what they become."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lowbit.integer.folding import Norm, fold
from lowbit.integer.graph import (
    Add,
    Clamp,
    Concat,
    Conv,
    Graph,
    Linear,
    Node,
    Pool,
    Reshape,
    Window,
)


def trace(program: ExportedProgram) -> Graph:
    """The network of a program, without its batch: norms are folded, and a ReLU is part of the node before it.

    Args:
        program: by torch.export.export, in eval mode, of a module that takes one tensor (batch, ...) and returns one.
            A batch of any size, fixed or not: the graph takes every size.

    Returns:
        A Graph in float64. Its results are those of the program, but for rounding.

    Raises:
        TypeError: `program` is no ExportedProgram.
        NotImplementedError: an op has no integer form; the message names it and its module.
        ValueError: there is more than one input or output, a batch is lost, or nothing is left to compute.

    Example:
        >>> graph = trace(torch.export.export(model.eval(), (x,)))
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be a torch.export.ExportedProgram, got {type(program)}")
    with warnings.catch_warnings():
        # torch's own, about itself.
        warnings.simplefilter("ignore", FutureWarning)
        # In-place ops become plain ones; composite ones, as conv2d and linear are, stay.
        program = program.run_decompositions({})
    return fold(_Tracer(program).graph())


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _pair(value: Any, dims: int) -> tuple[int, int]:
    """An argument of one number or one a dimension, for (height, width)."""
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    values = values * dims if len(values) == 1 else values
    return values[0] if dims == 2 else 1, values[-1]


class _Tracer:
    """What a program holds, by the names of its nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        inputs = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
        outputs = [spec for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1 or len(signature.output_specs) != 1:
            raise ValueError(
                "the program must take one tensor and return one, and change no buffer (eval mode), got "
                f"{len(inputs)} inputs, {len(outputs)} results and {len(signature.output_specs) - len(outputs)} "
                "changed tensors"
            )
        self.input, self.output = str(inputs[0].arg.name), str(outputs[0].arg.name)
        self.constants: dict[str, Tensor] = {}
        held = {**program.state_dict, **program.constants}
        for spec in signature.input_specs:
            if spec.target is not None and isinstance(held.get(spec.target), Tensor):
                t = held[spec.target].detach().to("cpu")
                self.constants[spec.arg.name] = t.to(torch.float64) if t.is_floating_point() else t
        self.fx_nodes = list(program.graph.nodes)
        self.batch: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        self.nodes: list[Node] = []

    def graph(self) -> Graph:
        """Walks the program."""
        for node in self.fx_nodes:
            if node.op == "placeholder" and node.name == self.input:
                self._enter(node)
            elif node.op == "call_function":
                self._add(node)
        output = self.aliases.get(self.output, self.output)
        if output == self.input or output not in self.shapes:
            raise ValueError(f"the program must compute its result from its input, got {output}")
        needed, nodes = {output}, []
        for made in reversed(self.nodes):
            if made.name in needed:
                needed.update(made.inputs)
                nodes.append(made)
        return Graph(self.input, self.shapes[self.input], tuple(reversed(nodes)), output)

    def _enter(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            raise ValueError(
                f"the input must be a tensor (batch, ...) of floating point, got {value}"
            )
        self.batch = value.shape[0]
        self.shapes[node.name] = self._sample(node)

    def _sample(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a result without its batch."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != self.batch:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"{_where(node)}: results must keep the batch of {self.batch} as their first dimension, "
                f"got {shape}"
            )
        sizes = tuple(value.shape[1:])
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(
                f"{_where(node)}: all sizes but the batch must be fixed and positive, got {sizes}"
            )
        return sizes

    def _add(self, node: fx.Node) -> None:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            # The batch, as a reshape takes it.
            return
        name = str(node.target).removeprefix("aten.")
        if name not in _OPS:
            raise NotImplementedError(f"{_where(node)}: {node.target} has no integer form")
        try:
            made = _OPS[name](self, node)
            if made is None:
                self.aliases[node.name] = self._source(node.args[0])
                return
        except _NoForm as why:
            raise NotImplementedError(f"{_where(node)}: {node.target} {why}") from None
        self.nodes.append(made)
        self.shapes[node.name] = made.shape

    def _source(self, argument: Any) -> str:
        """The name of an activation."""
        name = argument.name if isinstance(argument, fx.Node) else repr(argument)
        name = self.aliases.get(name, name)
        if name not in self.shapes:
            raise _NoForm(f"takes {name:.80} where a result of the network is expected")
        return name

    def _constant(self, argument: Any) -> Tensor | None:
        if argument is None:
            return None
        name = argument.name if isinstance(argument, fx.Node) else repr(argument)
        if name not in self.constants:
            raise _NoForm(f"takes {name:.80} where a parameter is expected")
        return self.constants[name]

    def common(self, node: fx.Node, *inputs: Any) -> dict[str, Any]:
        """The fields that every node has."""
        names = tuple(self._source(i) for i in inputs)
        return {
            "name": node.name,
            "path": _module_of(node),
            "inputs": names,
            "shape": self._sample(node),
        }

    def weighted(self, node: fx.Node, arguments: list[Any]) -> dict[str, Any]:
        """Those of a node with a weight and a bias, the second and third arguments."""
        weight, bias = self._constant(arguments[1]), self._constant(arguments[2])
        assert weight is not None
        if bias is None:
            bias = torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu")
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{_where(node)}: a weight or bias is NaN or infinite")
        return {**self.common(node, arguments[0]), "weight": weight, "bias": bias}

    def in_shape(self, argument: Any, dims: int) -> tuple[int, ...]:
        """The shape (C, W) or (C, H, W) of an activation."""
        shape = self.shapes[self._source(argument)]
        if len(shape) != dims + 1:
            raise _NoForm(f"needs an input of {dims + 2} dimensions, got {len(shape) + 1}")
        return shape


class _NoForm(Exception):
    """Why these arguments of an op have no integer form."""


def _where(node: fx.Node) -> str:
    return f"{_module_of(node) or 'the model'} ({node.name})"


def _given(node: fx.Node, *defaults: tuple[str, Any]) -> list[Any]:
    """The arguments of an op, in order, with what is not given as its schema has it."""
    found = []
    for place, (name, default) in enumerate(defaults):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
        found.append(value)
    return found


def _same(t: _Tracer, node: fx.Node) -> None:
    return None


def _first(t: _Tracer, node: fx.Node) -> None:
    """The first of several results, which is a norm's only one."""
    if node.args[1] != 0:
        raise _NoForm("takes a result that is none of activations")


def _dropout(t: _Tracer, node: fx.Node) -> None:
    if node.args[2]:
        raise _NoForm("drops at random: export the model in eval mode")


def _reshape(t: _Tracer, node: fx.Node) -> Reshape | None:
    made = Reshape(**t.common(node, node.args[0]))
    return None if made.shape == t.shapes[made.inputs[0]] else made


def _linear(t: _Tracer, node: fx.Node) -> Linear:
    return Linear(
        **t.weighted(node, _given(node, ("input", None), ("weight", None), ("bias", None)))
    )


def _conv(dims: int) -> Callable[[_Tracer, fx.Node], Conv]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def make(t: _Tracer, node: fx.Node) -> Conv:
        given = _given(node, *zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
        fields = t.weighted(node, given)
        weight = fields["weight"]
        size, dilation = _pair(weight.shape[2:], dims), _pair(given[5], dims)
        if given[4] == "same":
            # An odd total has the larger part behind.
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True))
        else:
            padding = (0, 0) if given[4] == "valid" else _pair(given[4], dims)
        if dims == 1:
            padding = (0, padding[1])
        window = Window(
            size=size,
            stride=_pair(given[3], dims),
            padding=(padding[0], padding[1]),
            dilation=dilation,
        )
        fields["weight"] = weight.reshape(*weight.shape[:2], *size)
        shape = t.in_shape(given[0], dims)
        return Conv(**fields, window=window, groups=int(given[6]), in_shape=shape)

    return make


def _pool(
    dims: int, mean: bool, names: tuple[tuple[str, Any], ...]
) -> Callable[[_Tracer, fx.Node], Pool]:
    def make(t: _Tracer, node: fx.Node) -> Pool:
        defaults = (("input", None), ("kernel_size", None), *names)
        given = dict(zip((n for n, _ in defaults), _given(node, *defaults), strict=True))
        fields, shape = t.common(node, given["input"]), t.in_shape(given["input"], dims)
        if given.get("divisor_override") is not None:
            raise _NoForm("divides by a number of its own")
        size = _pair(given["kernel_size"], dims)
        stride = _pair(given["stride"] or given["kernel_size"], dims)
        padding = _pair(given["padding"], dims)
        padding = (padding[0] if dims == 2 else 0, padding[1])
        dilation = _pair(given.get("dilation", 1), dims)
        window = Window(size=size, stride=stride, padding=padding, dilation=dilation)
        if given["ceil_mode"] and fields["shape"][1:] != _floor_sizes(shape[1:], window):
            raise _NoForm("has windows that end outside (ceil_mode)")
        counted = bool(given.get("count_include_pad", True))
        return Pool(**fields, window=window, mean=mean, in_shape=shape, count_padding=counted)

    return make


def _floor_sizes(space: tuple[int, ...], window: Window) -> tuple[int, ...]:
    sizes = [1, *space][-2:]
    found = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            sizes, window.padding, window.dilation, window.size, window.stride, strict=True
        )
    ]
    return tuple(found[-len(space) :])


def _whole(fields: dict[str, Any], shape: tuple[int, ...], size: tuple[int, int]) -> Pool:
    window = Window(size=size, stride=size, padding=(0, 0))
    return Pool(**fields, window=window, mean=True, in_shape=shape)


def _adaptive(dims: int) -> Callable[[_Tracer, fx.Node], Pool]:
    def make(t: _Tracer, node: fx.Node) -> Pool:
        fields, shape = t.common(node, node.args[0]), t.in_shape(node.args[0], dims)
        out = fields["shape"][1:]
        if any(a % b for a, b in zip(shape[1:], out, strict=True)):
            raise _NoForm(f"has windows of several sizes: {shape[1:]} to {out}")
        size = _pair([a // b for a, b in zip(shape[1:], out, strict=True)], dims)
        return _whole(fields, shape, size)

    return make


def _mean(t: _Tracer, node: fx.Node) -> Pool:
    fields = t.common(node, node.args[0])
    shape = t.shapes[fields["inputs"][0]]
    dims = node.args[1] if len(node.args) > 1 else None
    axes = sorted(d % (len(shape) + 1) for d in dims) if isinstance(dims, (list, tuple)) else []
    if len(shape) not in (2, 3) or axes != list(range(2, len(shape) + 1)):
        raise _NoForm(
            f"must be taken over all dimensions behind the channels, got {dims} of {shape}"
        )
    return _whole(fields, shape, _pair(shape[1:], len(shape) - 1))


def _add_op(t: _Tracer, node: fx.Node) -> Add:
    if node.kwargs.get("alpha", 1) != 1:
        raise _NoForm(f"has alpha {node.kwargs['alpha']}")
    made = Add(**t.common(node, *node.args[:2]))
    if any(t.shapes[name] != made.shape for name in made.inputs):
        raise _NoForm(f"adds shapes {[t.shapes[name] for name in made.inputs]} that differ")
    return made


def _concat(t: _Tracer, node: fx.Node) -> Concat:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    fields = t.common(node, *parts)
    (axis,) = _given(node, ("tensors", None), ("dim", 0))[1:]
    axis = axis % (len(fields["shape"]) + 1)
    if axis == 0:
        raise _NoForm("joins batches")
    return Concat(**fields, axis=axis - 1)


def _clamp(
    *defaults: tuple[str, float | None], below: float | None = None
) -> Callable[[_Tracer, fx.Node], Clamp]:
    def make(t: _Tracer, node: fx.Node) -> Clamp:
        low, high = _given(node, ("self", None), *defaults)[1:]
        low, high = (
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )
        if not low <= 0 <= high:
            raise _NoForm(f"clamps to {low} .. {high}, which 0 is not in")
        return Clamp(**t.common(node, node.args[0]), low=low, high=high)

    return make


def _norm(t: _Tracer, node: fx.Node) -> Norm:
    x, weight, bias, mean, variance, _, eps = node.args[:7]
    mean_, variance_ = t._constant(mean), t._constant(variance)
    assert mean_ is not None
    assert variance_ is not None
    assert isinstance(eps, float)
    gamma, beta = t._constant(weight), t._constant(bias)
    factor = (variance_ + eps).rsqrt()
    factor = factor if gamma is None else factor * gamma
    offset = -mean_ * factor
    offset = offset if beta is None else offset + beta
    shape = t.shapes[t._source(x)]
    if not bool(factor.isfinite().all() and offset.isfinite().all()):
        raise ValueError(f"{_where(node)}: statistics or parameters are NaN or infinite")
    return Norm(
        name=node.name,
        path=_module_of(node),
        inputs=(t._source(x),),
        shape=shape,
        factor=factor,
        offset=offset,
    )


_MAX_NAMES = (("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
_MEAN_NAMES = (
    ("stride", None),
    ("padding", 0),
    ("ceil_mode", False),
    ("count_include_pad", True),
)
_OPS: dict[str, Callable[[_Tracer, fx.Node], Node | None]] = {
    **dict.fromkeys(("clone.default", "alias.default", "detach.default"), _same),
    **dict.fromkeys(("contiguous.default", "lift_fresh_copy.default"), _same),
    str(operator.getitem): _first,
    "dropout.default": _dropout,
    **dict.fromkeys(("view.default", "reshape.default", "_unsafe_view.default"), _reshape),
    **dict.fromkeys(("flatten.using_ints", "unsqueeze.default"), _reshape),
    **dict.fromkeys(("squeeze.default", "squeeze.dim", "squeeze.dims"), _reshape),
    "linear.default": _linear,
    **dict.fromkeys(("conv1d.default", "conv1d.padding"), _conv(1)),
    **dict.fromkeys(("conv2d.default", "conv2d.padding"), _conv(2)),
    "_native_batch_norm_legit_no_training.default": _norm,
    "max_pool1d.default": _pool(1, False, _MAX_NAMES),
    "max_pool2d.default": _pool(2, False, _MAX_NAMES),
    "avg_pool1d.default": _pool(1, True, _MEAN_NAMES),
    "avg_pool2d.default": _pool(2, True, (*_MEAN_NAMES, ("divisor_override", None))),
    "adaptive_avg_pool1d.default": _adaptive(1),
    "adaptive_avg_pool2d.default": _adaptive(2),
    "mean.dim": _mean,
    "add.Tensor": _add_op,
    "cat.default": _concat,
    "relu.default": _clamp(("low", 0.0), ("high", None)),
    "relu6.default": _clamp(("low", 0.0), ("high", 6.0)),
    "hardtanh.default": _clamp(("min_val", -1.0), ("max_val", 1.0)),
    "clamp.default": _clamp(("min", None), ("max", None)),
    "clamp_min.default": _clamp(("min", None), ("max", None)),
}
