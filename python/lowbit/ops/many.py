"""What lowbit::linear_epilogue and lowbit::linear_many compute, and their fakes; `ops.py` defines them."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit import backends, checks, modes
from lowbit.formats import Format
from lowbit.strides import contiguous, rows_of, shaped


def linear_epilogue_impl(
    device_type: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    activation: str | None,
) -> Tensor:
    """lowbit::linear_epilogue on a device."""
    tensors = (codes, scales, zeros, table)
    checks.refuse_grad("linear_epilogue", x, *tensors, bias, gate, residual)
    format = checks.check_linear(x, *tensors, bias, spec, layout, n, k)
    checks.check_epilogue(x, n, activation, gate, residual)
    bias = contiguous(bias)
    others = (None if t is None else rows_of(t, n) for t in (gate, residual))
    backend: ModuleType = backends.find_cached(device_type, layout)
    y = backend.linear_epilogue(rows_of(x, k), *tensors, bias, format, n, k, activation, *others)
    return shaped(y, *x.shape[:-1], n)


def linear_many_impl(
    device_type: str,
    x: Tensor,
    codes: list[Tensor],
    scales: list[Tensor | None],
    zeros: list[Tensor | None],
    table: list[Tensor | None],
    bias: list[Tensor | None],
    spec: list[str],
    layout: str,
    n: list[int],
    k: int,
) -> list[Tensor]:
    """lowbit::linear_many on a device."""
    if torch.is_grad_enabled() or modes.in_dual_level():
        checks.refuse_grad("linear_many", x, *scales, *zeros, *table, *bias)
    # The dispatcher negates a tensor whose negative bit is set, but not one in a list of optional ones.
    bias = [b if b is None or not b.is_neg() else b.resolve_neg() for b in bias]
    if len(spec) == len(n):
        plans = [backends.cpu.plan(s, layout, rows, k) for s, rows in zip(spec, n, strict=True)]
        threads = torch.get_num_threads()
        made: list[Tensor] | None = backends.cpu.linear_many_tensors(
            plans, threads, x, codes, scales, zeros, table, bias
        )
        if made is not None:
            return made
    weights, formats = _check_linear_many(x, codes, scales, zeros, table, bias, spec, layout, n, k)
    biases = [contiguous(b) for b in bias]
    backend: ModuleType = backends.find_cached(device_type, layout)
    outs = backend.linear_many(rows_of(x, k), weights, biases, formats, n, k)
    return [shaped(y, *x.shape[:-1], y.shape[1]) for y in outs]


class Group(Protocol):
    """Weights that are multiplied with one x."""

    def arguments(self) -> tuple[Any, ...]:
        """What lowbit::linear_many takes after x."""


# The groups that lowbit::linear_siblings knows by number: passing their tensors one by one through
# the dispatcher takes longer than three small products.
groups: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


def linear_siblings_impl(device_type: str, x: Tensor, group: int) -> list[Tensor]:
    """lowbit::linear_siblings on a device."""
    return linear_many_impl(device_type, x, *arguments(group))


def linear_siblings_fake(x: Tensor, group: int) -> list[Tensor]:
    """Empty results."""
    return [x.new_empty((*x.shape[:-1], n)) for n in arguments(group)[-2]]


def arguments(group: int) -> tuple[Any, ...]:
    """What lowbit::linear_many takes after x for a group of lowbit::linear_siblings."""
    found = groups.get(group)
    if found is None:
        raise ValueError(f"group must be that of fused layers that exist, got {group}")
    return found.arguments()


def _check_linear_many(
    x: Tensor, *args: Any
) -> tuple[list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]], list[Format]]:
    codes, scales, zeros, table, bias, spec, layout, n, k = args
    counts = [len(a) for a in (codes, scales, zeros, table, bias, spec, n)]
    if len(set(counts)) != 1:
        raise ValueError(
            f"codes, scales, zeros, table, bias, format and n must be equally long, got {counts}"
        )
    weights = list(zip(codes, scales, zeros, table, strict=True))
    checks.refuse_grad("linear_many", x, *(t for w in weights for t in w), *bias)
    formats = [
        checks.check_linear(x, *w, bias[i], spec[i], layout, n[i], k) for i, w in enumerate(weights)
    ]
    return weights, formats


def linear_epilogue_fake(x: Tensor, *args: Any) -> Tensor:
    """Checks, and an empty result."""
    gate, residual, *meaning, activation = args[5:]
    checks.refuse_grad("linear_epilogue", x, *args[:7])
    checks.check_linear(x, *args[:5], *meaning)
    checks.check_epilogue(x, meaning[2], activation, gate, residual)
    return x.new_empty((*x.shape[:-1], meaning[2]))


def linear_many_fake(x: Tensor, *args: Any) -> list[Tensor]:
    """Checks, and empty results."""
    _check_linear_many(x, *args)
    return [x.new_empty((*x.shape[:-1], n)) for n in args[-2]]
