"""lowbit::linear_experts: the product of a mixture of experts, of rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import backends
from lowbit.layouts import Operands
from lowbit.ops import checks, library
from lowbit.ops.linear import autocast
from lowbit.strides import contiguous, rows_of, shaped


def linear_experts(
    x: Tensor, counts: Tensor, weights: Sequence[Operands], biases: Sequence[Tensor | None]
) -> Tensor:
    """x W[e]^T + bias[e] of the rows of each expert e, bit for bit what `linear` gives for these rows.

    It has no gradients: with them layers are called one by one.

    Args:
        x: (S, K) in fp32, bf16 or fp16, its rows in the order of the experts.
        counts: (experts,) int64, how many rows each expert has.
        weights: (N, K) each, in any formats of one layout, all on the device of x.
        biases: (N,) or None for each weight.

    Returns:
        (S, N) in the dtype of x.

    Raises:
        TypeError, ValueError: as `linear`; or counts do not add up to S, or not one for each weight.
    """
    return _linear_experts(autocast(x), counts, *library.scatter(weights), list(biases))  # type: ignore[no-any-return]


def _check(x: Tensor, counts: Tensor, weights: list[Operands], bias: list[Tensor | None]) -> None:
    if not weights or len(bias) != len(weights):
        raise ValueError(
            f"bias must have one entry a weight, got {len(bias)} for {len(weights)} weights"
        )
    checks.refuse_grad("linear_experts", x, *(t for w in weights for t in w.tensors), *bias)
    if x.dim() != 2:
        raise ValueError(f"x must be (S, K), got {tuple(x.shape)}")
    for w, b in zip(weights, bias, strict=True):
        checks.check_linear(x, w, b)
    if len({(w.layout, w.n) for w in weights}) > 1:
        raise ValueError(
            f"weights must have one layout and one N, got {sorted({(w.layout, w.n) for w in weights})}"
        )
    if counts.dtype != torch.int64 or tuple(counts.shape) != (len(weights),):
        raise ValueError(
            f"counts must be int64 of shape ({len(weights)},), got {counts.dtype} of {tuple(counts.shape)}"
        )


def _compute(
    x: Tensor, counts: Tensor, weights: list[Operands], bias: list[Tensor | None]
) -> Tensor:
    _check(x, counts, weights, bias)
    sizes = counts.tolist()
    if min(sizes) < 0 or sum(sizes) != len(x):
        raise ValueError(f"counts must add up to {len(x)} rows, got {sizes}")
    backend = backends.find(x.device.type, weights[0].layout)
    made, start = [], 0
    for w, b, size in zip(weights, bias, sizes, strict=True):
        if size:
            part = rows_of(x[start : start + size], w.k)
            made.append(shaped(backend.linear(part, w, contiguous(b)), size, w.n))
            start += size
    return torch.cat(made) if made else x.new_empty((0, weights[0].n))


def _fake(x: Tensor, counts: Tensor, weights: list[Operands], bias: list[Tensor | None]) -> Tensor:
    _check(x, counts, weights, bias)
    return x.new_empty((x.shape[0], weights[0].n))


_linear_experts = library.op(
    "linear_experts",
    "(Tensor x, Tensor counts, {Ws}, Tensor?[] bias) -> Tensor",
    _compute,
    _fake,
)
