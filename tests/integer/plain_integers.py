"""What every node of an integer transformer computes, once more in Python's integers, one number at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.integer.coded import Coded, Shifted
from lowbit.integer.execution import IntegerGraph, IntegerNode
from lowbit.integer.functions import PolynomialExponential, ShiftExponential
from lowbit.integer.graph import Add, Concat, Conv, Linear, Permute, Pool, Reshape, Take
from lowbit.integer.rescaling import Grid, Rescale
from lowbit.integer.transformer import Constant, Gelu, LayerNorm, MatMul, Requantize, Scale, Softmax

INT32 = 2**31


def fits(x: int) -> int:
    """x, which must be an int32."""
    assert -INT32 <= x < INT32, x
    return x


def shifted(x: int, lift: int) -> int:
    return x << lift if lift >= 0 else (x + (1 << (-lift - 1))) >> -lift


def rescaled(r: Rescale, x: int, channel: int) -> int:
    """gemmlowp's two roundings, or a shift with ties up."""
    i = channel if r.shift.numel() > 1 else 0
    shift = int(r.shift[i])
    if r.multiplier is None:
        return (fits(x) + ((1 << shift >> 1) if r.rounding == "nearest" else 0)) >> shift
    x = max(-INT32, min(INT32 - 1, fits(x) << max(0, -shift)))
    x = (x * int(r.multiplier[i]) + 2**30) >> 31
    if shift <= 0:
        return x
    return int(math.copysign((abs(x) + (1 << shift >> 1)) >> shift, x))


def shift_exponential(x: int, e: ShiftExponential) -> int:
    x = shifted(x, e.lift)
    x = max(x + (x >> 1) - (x >> 4), -e.unit * e.halvings)
    q = x // -e.unit
    return ((x + q * e.unit + 2 * e.unit) << e.halvings) >> (q + 1)


def polynomial_exponential(x: int, e: PolynomialExponential) -> int:
    x = max(shifted(x, e.lift), -31 * e.ln2)
    z = -x // e.ln2
    r = x + z * e.ln2
    return fits(fits((r + e.linear) * r) + e.one) >> z


def exponential(x: int, e: Any) -> int:
    """Of either kind."""
    if isinstance(e, ShiftExponential):
        return shift_exponential(x, e)
    return polynomial_exponential(x, e)


def operands(q: np.ndarray, grid: Grid) -> np.ndarray:
    """Multiples of the scale, as Python's integers."""
    out = np.empty(q.shape, dtype=object)
    for place in np.ndindex(q.shape):
        value = int(q[place])
        if isinstance(grid, Coded):
            out[place] = int(grid.table[value])
        elif isinstance(grid, Shifted):
            out[place] = (value - grid.zero) << int(grid.shifts[place[-1]])
        else:
            out[place] = value - grid.zero
    return out


def softmax_row(n: Any, row: list[int]) -> list[int]:
    grid, top = n.grid, max(row)
    e = [exponential(v - top, n.exponential) for v in row]
    total = fits(sum(e))
    if n.direct:
        codes = []
        for v in e:
            ratio = (total + v // 2) // v if v else 0
            k = max(0, ratio.bit_length() - 1)
            code = k + (2 * ratio >= 3 << k) if v else grid.most
            codes.append(min(code, grid.most))
        return codes
    factor = (INT32 - 1) // total
    p = [fits(v * factor) >> 16 for v in e]
    if isinstance(grid, Coded):
        bounds = [math.ceil(b * 2**15) for b in grid.bounds.tolist()]
        return [int(grid.used[sum(v >= b for b in bounds)]) for v in p]
    return [rescaled(n.rescales[0], v, 0) + grid.zero for v in p]


def norm_row(n: Any, row: list[int]) -> list[int]:
    x = [fits(shifted(v, n.lift)) for v in row]
    mean = math.floor(sum(x) / len(x) + 0.5)
    y = [v - mean for v in x]
    squares = max(1, fits(sum(v * v for v in y) + n.eps))
    pairs = 0
    while squares << (2 * pairs) < 2**29:
        pairs += 1
    factor = 2**30 // math.isqrt(squares << (2 * pairs))
    out = []
    for c, v in enumerate(y):
        z = fits((v << pairs) * factor) * int(n.signs[c])
        out.append(rescaled(n.out, rescaled(n.rescales[0], z, c) + int(n.bias[c]), 0) + n.grid.zero)
    return out


def rows(x: np.ndarray, f: Callable[[list[int]], list[int]]) -> np.ndarray:
    flat = x.reshape(-1, x.shape[-1])
    return np.array([f(list(row)) for row in flat], dtype=object).reshape(x.shape)


def each(shape: Iterable[int], f: Callable[..., int]) -> np.ndarray:
    out = np.empty(tuple(shape), dtype=object)
    for place in itertools.product(*(range(s) for s in out.shape)):
        out[place] = f(*place)
    return out


def compute(n: IntegerNode, qs: list[np.ndarray], grids: list[Grid]) -> np.ndarray:
    """The result of one sample, before it is clamped."""
    node, zero = n.node, n.grid.zero
    xs = [operands(q, g) for q, g in zip(qs, grids, strict=True)]
    if isinstance(node, Constant):
        assert n.weight is not None
        return n.weight.numpy().astype(object)
    if isinstance(node, (Linear, Conv)):
        assert n.weight is not None
        assert n.bias is not None
        # The zero point of the input is part of the bias: it is put back.
        w = n.weight.numpy().astype(object)
        b = [int(v) + grids[0].zero * int(w[i].sum()) for i, v in enumerate(n.bias)]
        if isinstance(grids[0], (Coded, Shifted)):
            assert grids[0].zero == 0 or isinstance(grids[0], Shifted)
        if isinstance(node, Linear):

            def linear(*at: int) -> int:
                total = fits(int((xs[0][at[:-1]] * w[at[-1]]).sum()) + b[at[-1]])
                return rescaled(n.rescales[0], total, at[-1]) + zero

            return each(node.shape, linear)
        (kh, kw), (sh, sw) = node.window.size, node.window.stride

        def conv(c: int, i: int, j: int) -> int:
            part = xs[0][:, i * sh : i * sh + kh, j * sw : j * sw + kw]
            return rescaled(n.rescales[0], fits(int((part * w[c]).sum()) + b[c]), c) + zero

        return each(node.shape, conv)
    if isinstance(node, MatMul):
        a, b_ = xs
        y = a @ (b_.swapaxes(-1, -2) if node.transposed else b_)
        return each(node.shape, lambda *at: rescaled(n.rescales[0], y[at], 0) + zero)
    if isinstance(node, Softmax):
        return rows(xs[0], lambda row: softmax_row(n, row))
    if isinstance(node, LayerNorm):
        return rows(xs[0], lambda row: norm_row(n, row))
    if isinstance(node, Gelu):
        table = n.table  # type: ignore[attr-defined]
        return each(node.shape, lambda *at: int(table[int(qs[0][at]) - grids[0].least]))
    if isinstance(node, Add):
        assert n.out is not None
        out = n.out

        def add(*at: int) -> int:
            parts = [rescaled(r, x[at] << n.lift, 0) for x, r in zip(xs, n.rescales, strict=True)]
            return rescaled(out, fits(sum(parts)), at[-1]) + zero

        return each(node.shape, add)
    if isinstance(node, Concat):
        parts = [
            each(x.shape, lambda *at, x=x, r=r: rescaled(r, x[at], 0) + zero)
            for x, r in zip(xs, n.rescales, strict=True)
        ]
        return np.concatenate(parts, node.axis)
    if isinstance(node, Requantize):
        return each(node.shape, lambda *at: rescaled(n.rescales[0], xs[0][at], 0) + zero)
    (q,) = qs
    if isinstance(node, Permute):
        return q.transpose(node.order)
    if isinstance(node, Take):
        at = [slice(None)] * q.ndim
        at[node.axis] = slice(node.start, node.start + node.length)
        return q[tuple(at)].reshape(node.shape)
    if isinstance(node, Pool):

        def mean(c: int, *_: int) -> int:
            total, count = sum(int(v) for v in q[c].flatten()), q[c].size
            return int(math.copysign((abs(total) + count // 2) // count, total))

        assert math.prod(node.window.size) == q[0].size
        return each((node.shape[0],), mean)
    assert isinstance(node, (Reshape, Scale))
    return q.reshape(node.shape)


def run(graph: IntegerGraph, q: Tensor) -> dict[str, np.ndarray]:
    """All results of one sample (*shape)."""
    grids = graph.grids
    found: dict[str, np.ndarray] = {graph.input: q.numpy().astype(object)}
    for n in graph.nodes:
        names = n.node.inputs
        y = compute(n, [found[name] for name in names], [grids[name] for name in names])
        found[n.node.name] = np.vectorize(
            lambda v, n=n: max(n.low, min(n.high, v)), otypes=[object]
        )(y)
    return found
