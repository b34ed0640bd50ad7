"""Which aten ops of transformers have an integer form, and what they become."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lowbit.integer.graph import Node, Permute, Take
from lowbit.integer.tracer import NoForm, Op, Tracer, given, where
from lowbit.integer.transformer import (
    Gelu,
    LayerNorm,
    MatMul,
    Scale,
    Softmax,
    attention_scale,
)

# What a slice to the end has for one.
_END = 2**63 - 1


def _layer_norm(t: Tracer, node: fx.Node) -> LayerNorm:
    names = (("input", None), ("normalized_shape", None), ("weight", None), ("bias", None))
    x, over, weight, bias, eps = given(node, *names, ("eps", 1e-5))
    fields = t.common(node, x)
    width = fields["shape"][-1]
    if list(over) != [width]:
        raise NoForm(f"must be taken over the last dimension of {width}, got {list(over)}")
    gamma, beta = t.constant(weight), t.constant(bias)
    gamma = torch.ones(width, dtype=torch.float64, device="cpu") if gamma is None else gamma
    beta = torch.zeros(width, dtype=torch.float64, device="cpu") if beta is None else beta
    if not bool(gamma.isfinite().all() and beta.isfinite().all()):
        raise ValueError(f"{where(node)}: a weight or bias is NaN or infinite")
    return LayerNorm(**fields, weight=gamma, bias=beta, eps=float(eps))


def _softmax(t: Tracer, node: fx.Node) -> Softmax:
    fields = t.common(node, node.args[0])
    if (dim := node.args[1]) not in (-1, len(fields["shape"])):
        raise NoForm(f"must be taken over the last dimension, got {dim}")
    return Softmax(**fields)


def _gelu(t: Tracer, node: fx.Node) -> Gelu:
    x, form = given(node, ("self", None), ("approximate", "none"))
    return Gelu(**t.common(node, x), tanh=form == "tanh")


def _matmul(t: Tracer, node: fx.Node) -> MatMul:
    fields = t.common(node, *node.args[:2])
    shapes = [t.shapes[name] for name in fields["inputs"]]
    if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 2 or shapes[0][:-2] != shapes[1][:-2]:
        raise NoForm(f"multiplies shapes {shapes} that are not of one kind")
    return MatMul(**fields, depth=shapes[0][-1])


def _attention(t: Tracer, node: fx.Node) -> MatMul:
    names = (("query", None), ("key", None), ("value", None), ("attn_mask", None), ("dropout", 0.0))
    rest = (("is_causal", False), ("scale", None), ("enable_gqa", False))
    q, k, v, mask, dropout, causal, scale, grouped = given(node, *names, *rest)
    if mask is not None or dropout or causal or grouped:
        raise NoForm("has a mask, dropout, causality or groups of heads")
    query, key, value = (t.source(x) for x in (q, k, v))
    rows, columns = t.shapes[query], t.shapes[key]
    alpha = attention_scale(rows[-1]) if scale is None else float(scale)
    if alpha <= 0:
        raise NoForm(f"has scale {alpha}")
    shape = (*rows[:-1], columns[-2])
    fields = t.before(node, query, shape) | {"inputs": (query, key)}
    logits = t.emit(MatMul(**fields, alpha=alpha, transposed=True, depth=rows[-1]))
    p = t.emit(Softmax(**t.before(node, logits, shape)))
    return MatMul(**(t.common(node, v) | {"inputs": (p, value)}), depth=columns[-2])


def _scale(t: Tracer, node: fx.Node) -> Node | None:
    x, factor = node.args[:2]
    if str(node.target).startswith("aten.div") and isinstance(factor, (int, float)):
        factor = 1 / factor
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise NoForm("must be by a positive number")
    return Scale(**t.common(node, x), factor=float(factor))


def _permuted(t: Tracer, node: fx.Node, order: list[int]) -> Permute | None:
    """With the batch among `order`, which counts dimensions of what the op takes as the program has them."""
    source = t.source(node.args[0], moved=True)
    dims = len(order)
    at = t.batch_at.get(source, 0)
    order = [d % dims for d in order]
    if order == list(range(dims)):
        return None
    rest = tuple(d - (d > at) for d in order if d != at)
    shape = tuple(t.shapes[source][d] for d in rest)
    fields = t.before(node, source, shape) | {"name": node.name}
    if order.index(at):
        t.batch_at[node.name] = order.index(at)
    return Permute(**fields, order=rest)


def _permute(t: Tracer, node: fx.Node) -> Permute | None:
    return _permuted(t, node, list(node.args[1]))  # type: ignore[arg-type]


def _transpose(t: Tracer, node: fx.Node) -> Permute | None:
    dims = len(t.shapes[t.source(node.args[0], moved=True)]) + 1
    order = list(range(dims))
    a, b = (int(d) % dims for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = b, a
    return _permuted(t, node, order)


def _taken(t: Tracer, node: fx.Node, source: str, dim: int, start: int, length: int | None) -> Take:
    """A slice along a dimension of the program's, or, without a length, one element without its dimension."""
    shape, at = t.shapes[source], t.batch_at.get(source, 0)
    dim = dim % (len(shape) + 1)
    if dim == at:
        raise NoForm("takes a part of the batch")
    axis = dim - (dim > at)
    size = shape[axis]
    start = max(0, start + size if start < 0 else start)
    middle = () if length is None else (length,)
    fields = t.before(node, source, (*shape[:axis], *middle, *shape[axis + 1 :]))
    moved = at - (dim < at and length is None)
    if moved:
        t.batch_at[node.name] = moved
    return Take(**(fields | {"name": node.name}), axis=axis, start=start, length=length or 1)


def _select(t: Tracer, node: fx.Node) -> Take:
    source, dim, index = node.args[:3]
    return _taken(t, node, t.source(source, moved=True), int(dim), int(index), None)  # type: ignore[arg-type]


def _slice(t: Tracer, node: fx.Node) -> Take | None:
    names = (("self", None), ("dim", 0), ("start", None), ("end", None), ("step", 1))
    x, dim, start, end, step = given(node, *names)
    source = t.source(x, moved=True)
    shape, at = t.shapes[source], t.batch_at.get(source, 0)
    dim, start, end = dim % (len(shape) + 1), start or 0, _END if end is None else end
    if step == 1 and start == 0 and end == _END:
        return None
    if dim == at or step != 1:
        raise NoForm("takes a part of the batch, or not every element")
    size = shape[dim - (dim > at)]
    first, last = (min(size, max(0, i + size if i < 0 else i)) for i in (start, end))
    if last <= first:
        raise NoForm(f"takes nothing: {start} to {end} of {size}")
    return _taken(t, node, source, dim, first, last - first)


def _several(t: Tracer, node: fx.Node) -> None:
    """Several results, which `getitem` takes apart."""
    t.source(node.args[0], moved=True)


def _item(t: Tracer, node: fx.Node) -> Take | None:
    of, index = node.args[:2]
    assert isinstance(of, fx.Node)
    assert isinstance(index, int)
    kind = str(of.target).removeprefix("aten.").partition(".")[0]
    if kind not in ("unbind", "split", "split_with_sizes", "chunk"):
        # A norm's only result.
        if index != 0:
            raise NoForm("takes a result that is none of activations")
        return None
    source = t.source(of.args[0], moved=True)
    if kind == "unbind":
        return _taken(t, node, source, given(of, ("self", 0), ("dim", 0))[1], index, None)
    dim = given(of, ("self", None), ("size", None), ("dim", 0))[2]
    sizes: list[Any] = [value.shape[dim] for value in of.meta["val"]]
    return _taken(t, node, source, dim, sum(sizes[:index]), sizes[index])


def _expand(t: Tracer, node: fx.Node) -> None:
    """A parameter for every sample, as a class token is."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or x.name not in t.constants:
        raise NoForm("repeats a result of the network")
    value, shape = t.constants[x.name], t.sample(node)
    if value.dim() == len(shape) + 1:
        if value.shape[0] != 1:
            raise NoForm(f"repeats a parameter of shape {tuple(value.shape)}")
        value = value[0]
    t.aliases[node.name] = t.fixed(node, value.expand(shape))


OPS: dict[str, Op] = {
    "layer_norm.default": _layer_norm,
    "softmax.int": _softmax,
    "gelu.default": _gelu,
    **dict.fromkeys(("matmul.default", "bmm.default"), _matmul),
    "scaled_dot_product_attention.default": _attention,
    **dict.fromkeys(("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"), _scale),
    "permute.default": _permute,
    "transpose.int": _transpose,
    "select.int": _select,
    "slice.Tensor": _slice,
    **dict.fromkeys(("unbind.int", "split.Tensor", "split_with_sizes.default"), _several),
    "chunk.default": _several,
    str(operator.getitem): _item,
    "expand.default": _expand,
}
