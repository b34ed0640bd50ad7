"""lowbit::linear_many and linear_siblings: several products with one x, and `linear_many`, which calls them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit import backends, modes
from lowbit.backends.cpu import requests
from lowbit.layouts import Operands
from lowbit.ops import autograd, checks, library
from lowbit.ops.linear import autocast, call_linear
from lowbit.ops.terms import Weight, terms
from lowbit.strides import contiguous, rows_of, shaped

_NUM_TENSORS = len(checks.TENSORS)


def linear_many(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """[x W^T + bias for each weight]: one conversion of x and one parallel region.

    Each result is bit for bit that of `linear`. They are separate calls if a gradient is needed or
    a weight has other terms.

    Args:
        x: (..., K), as in `linear`.
        weights: (N_i, K) in any formats, all on the device of x.
        biases: (N_i,) or None for each weight; None for no bias at all.

    Raises:
        TypeError, ValueError: as `linear`; or there is not one bias for each weight.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise ValueError(
            f"biases must have one entry for each of {len(weights)} weights, got {len(biases)}"
        )
    for bias in biases:
        checks.check_optional(biases=bias)
    given = [terms(weight) for weight in weights]
    x = autocast(x)
    needs_grad = torch.is_grad_enabled() and checks.requires_grad(
        x, *biases, *(t for w, _ in given for t in w.tensors)
    )
    apart = needs_grad or modes.in_dual_level() or any(others for _, others in given)
    if apart or len({w.layout for w, _ in given}) != 1:  # also no weights at all
        each = zip(given, biases, strict=True)
        return [call_linear(x, w, bias, *others) for (w, others), bias in each]
    return _linear_many(x, *arguments_of([w for w, _ in given], biases))  # type: ignore[no-any-return]


def arguments_of(weights: Sequence[Operands], biases: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What lowbit::linear_many takes after x."""
    return *library.scatter(weights), list(biases)


def _fast(slow: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """lowbit::linear_many: usual requests on the CPU go to the kernels at once."""

    def linear_many(x: Tensor, *args: Any) -> list[Tensor]:
        ys = _fast_products(x, *args)
        return slow(x, *args) if ys is None else ys

    return linear_many


def _fast_products(x: Tensor, *args: Any) -> list[Tensor] | None:
    *operands, bias = args
    tensors, meaning = operands[:_NUM_TENSORS], operands[_NUM_TENSORS:]
    if torch.is_grad_enabled() or modes.in_dual_level():
        checks.refuse_grad("linear_many", x, *(t for each in tensors for t in each), *bias)
    if len({len(each) for each in args}) != 1:
        return None
    plans = [requests.plan(*each) for each in zip(*meaning, strict=True)]
    threads = torch.get_num_threads()
    return requests.linear_many_tensors(plans, threads, x, *tensors, _resolved(bias))


def _resolved(bias: list[Tensor | None]) -> list[Tensor | None]:
    """The dispatcher negates a tensor whose negative bit is set, but not one in a list of optional ones."""
    return [b if b is None or not b.is_neg() else b.resolve_neg() for b in bias]


def _check(x: Tensor, weights: list[Operands], bias: list[Tensor | None]) -> None:
    if len(bias) != len(weights):
        raise ValueError(f"bias must have {len(weights)} entries, one a weight, got {len(bias)}")
    checks.refuse_grad("linear_many", x, *(t for w in weights for t in w.tensors), *bias)
    for w, b in zip(weights, bias, strict=True):
        checks.check_linear(x, w, b)
    if len({w.layout for w in weights}) > 1:
        raise ValueError(f"layout must be one for all, got {[w.layout for w in weights]}")


def _compute(x: Tensor, weights: list[Operands], bias: list[Tensor | None]) -> list[Tensor]:
    _check(x, weights, bias)
    if not weights:
        return []
    backend = backends.find(x.device.type, weights[0].layout)
    biases = [contiguous(b) for b in _resolved(bias)]
    outs = backend.linear_many(rows_of(x, weights[0].k), weights, biases)
    return [shaped(y, *x.shape[:-1], y.shape[1]) for y in outs]


def _fake(x: Tensor, weights: list[Operands], bias: list[Tensor | None]) -> list[Tensor]:
    _check(x, weights, bias)
    return [x.new_empty((*x.shape[:-1], w.n)) for w in weights]


def _transformed(x: Tensor, *args: Any) -> list[Tensor]:
    """Inside a transform: one after another."""
    return [autograd.Linear.apply(x, *each, None) for each in zip(*args, strict=True)]


class Group(Protocol):
    """Weights that are multiplied with one x."""

    def arguments(self) -> tuple[Any, ...]:
        """What lowbit::linear_many takes after x."""


# The groups that lowbit::linear_siblings knows by number: passing their tensors one by one through
# the dispatcher takes longer than three small products.
groups: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


def _arguments(group: int) -> tuple[Any, ...]:
    found = groups.get(group)
    if found is None:
        raise ValueError(f"group must be that of fused layers that exist, got {group}")
    return found.arguments()


def _siblings(x: Tensor, group: int) -> list[Tensor]:
    *operands, bias = _arguments(group)
    made = _fast_products(x, *operands, bias)
    return _compute(x, library.gather(*operands), bias) if made is None else made


def _siblings_fake(x: Tensor, group: int) -> list[Tensor]:
    weights = library.gather(*_arguments(group)[:-1])
    return [x.new_empty((*x.shape[:-1], w.n)) for w in weights]


def _transformed_siblings(x: Tensor, group: int) -> list[Tensor]:
    return _transformed(x, *_arguments(group))


_linear_many = library.op(
    "linear_many",
    "(Tensor x, {Ws}, Tensor?[] bias) -> Tensor[]",
    _compute,
    _fake,
    fast=_fast,
    transform=_transformed,
)
linear_siblings = library.op(
    "linear_siblings",
    "(Tensor x, int group) -> Tensor[]",
    _siblings,
    _siblings_fake,
    transform=_transformed_siblings,
)
