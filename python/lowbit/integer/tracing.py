"""From a `torch.export` program to a graph: which aten ops have an integer form, and what they become."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from lowbit.integer.folding import Norm, fold
from lowbit.integer.graph import (
    Add,
    Clamp,
    Concat,
    Conv,
    Graph,
    Linear,
    Node,
    Permute,
    Pool,
    Reshape,
    Window,
)
from lowbit.integer.tracer import NoForm, Tracer, given, module_of, where
from lowbit.integer.tracing_transformers import OPS


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
    return fold(Tracer(program, {**_OPS, **OPS}).graph())


def _pair(value: Any, dims: int) -> tuple[int, int]:
    """An argument of one number or one a dimension, for (height, width)."""
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    values = values * dims if len(values) == 1 else values
    return values[0] if dims == 2 else 1, values[-1]


def _same(t: Tracer, node: fx.Node) -> None:
    return None


def _dropout(t: Tracer, node: fx.Node) -> None:
    if node.args[2]:
        raise NoForm("drops at random: export the model in eval mode")


def _reshape(t: Tracer, node: fx.Node) -> Reshape | None:
    made = Reshape(**t.common(node, node.args[0]))
    return None if made.shape == t.shapes[made.inputs[0]] else made


def _linear(t: Tracer, node: fx.Node) -> Linear:
    return Linear(
        **t.weighted(node, given(node, ("input", None), ("weight", None), ("bias", None)))
    )


def _conv(dims: int) -> Callable[[Tracer, fx.Node], Conv]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def make(t: Tracer, node: fx.Node) -> Conv:
        values = given(node, *zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
        fields = t.weighted(node, values)
        weight = fields["weight"]
        size, dilation = _pair(weight.shape[2:], dims), _pair(values[5], dims)
        if values[4] == "same":
            # An odd total has the larger part behind.
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True))
        else:
            padding = (0, 0) if values[4] == "valid" else _pair(values[4], dims)
        if dims == 1:
            padding = (0, padding[1])
        window = Window(
            size=size,
            stride=_pair(values[3], dims),
            padding=(padding[0], padding[1]),
            dilation=dilation,
        )
        fields["weight"] = weight.reshape(*weight.shape[:2], *size)
        shape = t.in_shape(values[0], dims)
        return Conv(**fields, window=window, groups=int(values[6]), in_shape=shape)

    return make


def _pool(
    dims: int, mean: bool, names: tuple[tuple[str, Any], ...]
) -> Callable[[Tracer, fx.Node], Pool]:
    def make(t: Tracer, node: fx.Node) -> Pool:
        defaults = (("input", None), ("kernel_size", None), *names)
        values = dict(zip((n for n, _ in defaults), given(node, *defaults), strict=True))
        fields, shape = t.common(node, values["input"]), t.in_shape(values["input"], dims)
        if values.get("divisor_override") is not None:
            raise NoForm("divides by a number of its own")
        size = _pair(values["kernel_size"], dims)
        stride = _pair(values["stride"] or values["kernel_size"], dims)
        padding = _pair(values["padding"], dims)
        padding = (padding[0] if dims == 2 else 0, padding[1])
        dilation = _pair(values.get("dilation", 1), dims)
        window = Window(size=size, stride=stride, padding=padding, dilation=dilation)
        if values["ceil_mode"] and fields["shape"][1:] != _floor_sizes(shape[1:], window):
            raise NoForm("has windows that end outside (ceil_mode)")
        counted = bool(values.get("count_include_pad", True))
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


def _adaptive(dims: int) -> Callable[[Tracer, fx.Node], Pool]:
    def make(t: Tracer, node: fx.Node) -> Pool:
        fields, shape = t.common(node, node.args[0]), t.in_shape(node.args[0], dims)
        out = fields["shape"][1:]
        if any(a % b for a, b in zip(shape[1:], out, strict=True)):
            raise NoForm(f"has windows of several sizes: {shape[1:]} to {out}")
        size = _pair([a // b for a, b in zip(shape[1:], out, strict=True)], dims)
        return _whole(fields, shape, size)

    return make


def _mean(t: Tracer, node: fx.Node) -> Pool:
    values = given(node, ("self", None), ("dim", None), ("keepdim", False))
    fields = t.common(node, values[0])
    shape, dims = t.shapes[fields["inputs"][0]], values[1]
    axes = sorted(d % (len(shape) + 1) for d in dims) if isinstance(dims, (list, tuple)) else []
    if len(shape) == 2 and axes == [1]:
        # Tokens before channels.
        moved = t.emit(Permute(**t.before(node, fields["inputs"][0], shape[::-1]), order=(1, 0)))
        fields["inputs"], shape = (moved,), shape[::-1]
    elif len(shape) not in (2, 3) or axes != list(range(2, len(shape) + 1)):
        raise NoForm(
            f"must be taken over all dimensions behind the channels, or over the one before them, got {dims} of {shape}"
        )
    return _whole(fields, shape, _pair(shape[1:], len(shape) - 1))


def _add_op(t: Tracer, node: fx.Node) -> Add:
    if node.kwargs.get("alpha", 1) != 1:
        raise NoForm(f"has alpha {node.kwargs['alpha']}")
    made = Add(**t.common(node, *(t.spread(node, i) for i in range(2))))
    if any(t.shapes[name] != made.shape for name in made.inputs):
        raise NoForm(f"adds shapes {[t.shapes[name] for name in made.inputs]} that differ")
    return made


def _concat(t: Tracer, node: fx.Node) -> Concat:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    fields = t.common(node, *parts)
    (axis,) = given(node, ("tensors", None), ("dim", 0))[1:]
    axis = axis % (len(fields["shape"]) + 1)
    if axis == 0:
        raise NoForm("joins batches")
    return Concat(**fields, axis=axis - 1)


def _clamp(
    *defaults: tuple[str, float | None], below: float | None = None
) -> Callable[[Tracer, fx.Node], Clamp]:
    def make(t: Tracer, node: fx.Node) -> Clamp:
        low, high = given(node, ("self", None), *defaults)[1:]
        low, high = (
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )
        if not low <= 0 <= high:
            raise NoForm(f"clamps to {low} .. {high}, which 0 is not in")
        return Clamp(**t.common(node, node.args[0]), low=low, high=high)

    return make


def _norm(t: Tracer, node: fx.Node) -> Norm:
    x, weight, bias, mean, variance, _, eps = node.args[:7]
    mean_, variance_ = t.constant(mean), t.constant(variance)
    assert mean_ is not None
    assert variance_ is not None
    assert isinstance(eps, float)
    gamma, beta = t.constant(weight), t.constant(bias)
    factor = (variance_ + eps).rsqrt()
    factor = factor if gamma is None else factor * gamma
    offset = -mean_ * factor
    offset = offset if beta is None else offset + beta
    shape = t.shapes[t.source(x)]
    if not bool(factor.isfinite().all() and offset.isfinite().all()):
        raise ValueError(f"{where(node)}: statistics or parameters are NaN or infinite")
    return Norm(
        name=node.name,
        path=module_of(node),
        inputs=(t.source(x),),
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
_OPS: dict[str, Callable[[Tracer, fx.Node], Node | None]] = {
    **dict.fromkeys(("clone.default", "alias.default", "detach.default"), _same),
    **dict.fromkeys(("contiguous.default", "lift_fresh_copy.default"), _same),
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
