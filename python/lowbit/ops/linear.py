"""y = x W^T + bias: lowbit::linear, linear_trainable and linear_epilogue, and `linear`, which calls them.

`linear` refuses inputs that require grad; a separate `linear_trainable` has gradients for x, bias, scales, float zeros
and table, because autograd adds 2.7 us to a call. Other terms of a weight are ops of their own: their sum in fp32 is
`added` before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from lowbit import backends, modes, reference
from lowbit.backends.cpu import requests
from lowbit.layouts import Added, LowRankOperands, Operands, PrunedOperands
from lowbit.ops import autograd, checks, library
from lowbit.ops.lowrank import low_rank_linear
from lowbit.ops.pruned import operands_of, pruned_linear
from lowbit.ops.sparse import sparse_linear
from lowbit.ops.terms import Weight, terms
from lowbit.strides import contiguous, rows_of, shaped
from lowbit.weights.pruned import PrunedTensor

_NUM_TENSORS = len(checks.TENSORS)


def linear(
    x: Tensor,
    weight: Weight | PrunedTensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with a quantized weight, and what may follow it, rounded once.

    The result is activation(y) + residual, or with a gate activation(gate) * y + residual (the
    gated linear unit of Shazeer, arXiv 2002.05202). All of it is fp32 before the one rounding,
    unless a gradient is needed: then each step rounds, as separate modules do.

    Repetition and the number of threads never change a bit. The number of rows may: a row of a batch and the same row
    alone may differ in the last bits, because other kernels add in another order.

    Args:
        x: (..., K) in fp32, bf16 or fp16, any strides; autocast casts it to its dtype.
        weight: (N, K), on the device of x. A QuantTensor or PrunedTensor keeps the kernel's own copy of itself
            after the first call, so its tensors must not be written to afterwards.
        bias: (N,) in fp32, bf16 or fp16.
        activation: None, "relu", "silu", "gelu" or "gelu_tanh".
        gate, residual: (..., N) in the dtype of x; autocast casts them with it.

    Returns:
        (..., N) in the dtype of x, with gradients for all tensors that require them; of any order, inside transforms
        of torch.func, and with forward-mode AD. It is no view, and may be written to.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape, device, layout or the activation does not fit.
    """
    if bias is not None:
        checks.check_tensors(bias=bias)
    if isinstance(weight, PrunedTensor):
        found = operands_of(weight)
        return call_pruned(x, found, weight.shape[1], bias, activation, gate, residual)
    w, others = terms(weight)
    if activation is None and gate is None and residual is None:
        return call_linear(x, w, bias, *others)
    checks.check_optional(gate=gate, residual=residual)
    x = autocast(x)
    gate, residual = (None if t is None else autocast(t) for t in (gate, residual))
    checks.check_epilogue(x, w.n, activation, gate, residual)
    added = sum_of_products(x, *others) if others else None
    if modes.in_dual_level() or (
        torch.is_grad_enabled()
        and checks.requires_grad(x, gate, residual, w.scales, w.zeros, w.table, bias, added)
    ):
        y = _call_linear(x, w, bias, added)
        return reference.apply_epilogue(y, activation, gate, residual)
    return _linear_epilogue(x, *w, bias, gate, residual, added, activation)


def call_linear(x: Tensor, w: Operands, bias: Tensor | None = None, *others: Added) -> Tensor:
    """`linear` on the terms of a weight: applies autocast, takes the trainable op where grad is needed."""
    x = autocast(x)
    return _call_linear(x, w, bias, sum_of_products(x, *others) if others else None)


def _call_linear(x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None) -> Tensor:
    # modes.in_dual_level, without a call. What torch.compile traces is the op, which finds its transform itself.
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        return autograd.Linear.apply(x, *w, bias, added)
    if torch.is_grad_enabled() and checks.requires_grad(x, w.scales, w.zeros, w.table, bias, added):
        return _linear_trainable(x, *w, bias, added)
    if added is None:
        return _linear(x, *w, bias)
    return _linear_epilogue(x, *w, bias, None, None, added, None)


def call_pruned(
    x: Tensor,
    w: PrunedOperands,
    k: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` on the operands of a pruned weight with `k` columns."""
    checks.check_optional(gate=gate, residual=residual)
    x = autocast(x)
    gate, residual = (None if t is None else autocast(t) for t in (gate, residual))
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape (..., {k}), got {tuple(x.shape)}")
    if bias is not None:
        checks.check_bias(bias, w.n, x.device)
    checks.check_epilogue(x, w.n, activation, gate, residual)
    y = pruned_linear(x, w)
    if bias is not None:
        y = y + bias.float()
    return reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)


def sum_of_products(x: Tensor, *others: Added) -> Tensor | None:  # (..., N) fp32
    """The sum of the products of x with terms, in their order, in fp32, with derivatives for x and for dense factors;
    None of no terms.
    """
    total = None
    for term in others:
        if not isinstance(term, LowRankOperands):
            y = sparse_linear(x, term)
        elif isinstance(term.left, Tensor) and isinstance(term.right, Tensor):
            y = low_rank_linear(x, term.left, term.right)
        else:
            y = x.float()
            for factor in (term.right, term.left):
                assert isinstance(factor, Operands)
                y = _call_linear(y, factor, None, None)
        total = y if total is None else total + y
    return total


# A node of torch.fx graphs: it looks at what a traced tensor does not have.
torch.fx.wrap("call_linear")


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for, if it is on for its device."""
    if not isinstance(x, Tensor):
        checks.check_tensors(x=x)
    device_type = "cpu" if x.is_cpu else x.device.type
    if (
        # torch.compile cannot ask whether a device type has autocast.
        (device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type))
        and torch.is_autocast_enabled(device_type)
        and x.dtype in checks.FLOAT_DTYPES
    ):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _fast(slow: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """lowbit::linear: usual requests on the CPU go to the kernels with what is known of the weight looked up."""

    def linear(x: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            checks.refuse_grad("linear", x, *args[:_NUM_TENSORS], args[-1])
        y = _fast_product(x, *args)
        return slow(x, *args) if y is None else y

    return linear


def _fast_product(x: Tensor, *args: Any) -> Tensor | None:
    plan = requests.plan(*args[_NUM_TENSORS:-1])
    if plan is None:
        return None
    tensors, bias = args[:_NUM_TENSORS], args[-1]
    return requests.linear_tensors(plan, torch.get_num_threads(), x, *tensors, bias)


def _product(x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
    checks.check_linear(x, w, bias, added)
    backend, rows, bias = backends.find(x.device.type, w.layout), rows_of(x, w.k), contiguous(bias)
    if added is None:
        y = backend.linear(rows, w, bias)
    else:
        y = backend.linear_epilogue(rows, w, bias, None, None, rows_of(added, w.n), None)
    return shaped(y, *x.shape[:-1], w.n)


def _trainable(x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None) -> Tensor:
    if added is None:
        y = _fast_product(x, *w, bias)
        if y is not None:
            return y
    return _product(x, w, bias, added)


def _fake(x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
    checks.check_linear(x, w, bias, added)
    return x.new_empty((*x.shape[:-1], w.n))


def _inference_fake(x: Tensor, w: Operands, bias: Tensor | None) -> Tensor:
    checks.refuse_grad("linear", x, *w.tensors, bias)
    return _fake(x, w, bias)


def _check_epilogue(
    x: Tensor,
    w: Operands,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    added: Tensor | None,
    activation: str | None,
) -> None:
    checks.refuse_grad("linear_epilogue", x, *w.tensors, bias, gate, residual, added)
    checks.check_linear(x, w, bias, added)
    checks.check_epilogue(x, w.n, activation, gate, residual)


def _epilogue(x: Tensor, w: Operands, *args: Any) -> Tensor:
    _check_epilogue(x, w, *args)
    bias, gate, residual, added, activation = args
    gate, residual, added = (
        None if t is None else rows_of(t, w.n) for t in (gate, residual, added)
    )
    backend = backends.find(x.device.type, w.layout)
    y = backend.linear_epilogue(
        rows_of(x, w.k), w, contiguous(bias), gate, residual, added, activation
    )
    return shaped(y, *x.shape[:-1], w.n)


def _epilogue_fake(x: Tensor, w: Operands, *args: Any) -> Tensor:
    _check_epilogue(x, w, *args)
    return x.new_empty((*x.shape[:-1], w.n))


# Looking an overload up costs as much as a small call.
_linear = library.op(
    "linear",
    "(Tensor x, {W}, Tensor? bias) -> Tensor",
    _product,
    _inference_fake,
    fast=_fast,
    transform=autograd.transformed_linear,
)
_linear_trainable = library.op(
    "linear_trainable",
    "(Tensor x, {W}, Tensor? bias, Tensor? added) -> Tensor",
    _trainable,
    _fake,
    transform=autograd.Linear.apply,
    derivatives=(autograd.setup_context, autograd.backward),
)
_linear_epilogue = library.op(
    "linear_epilogue",
    "(Tensor x, {W}, Tensor? bias, Tensor? gate, Tensor? residual, Tensor? added, str? activation) -> Tensor",
    _epilogue,
    _epilogue_fake,
    transform=autograd.transformed_epilogue,
)
