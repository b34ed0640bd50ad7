"""lowbit::dequantize, embedding, codebook_grad, pack and unpack, and `dequantize` and `embedding`, which call them."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from lowbit import backends, layouts, reference
from lowbit.forking import alone_after_fork
from lowbit.layouts import Added, LowRankOperands, Operands
from lowbit.ops import autograd, checks, gradients, library
from lowbit.ops.terms import Weight, terms
from lowbit.strides import contiguous, shaped
from lowbit.weights.quantized import QuantTensor

_ASSERTING = ("cuda", "meta")  # devices whose tensors are asserted about, not looked at


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype` (fp32, bf16 or fp16).

    A QuantTensor is read in its canonical layout, unless it has a copy in the kernel's layout already, or needs none:
    that of structured formats on the CPU is the canonical one.
    """
    if isinstance(weight, QuantTensor) and weight._packed is None and not _same(weight):
        weight = layouts.to_kernel(weight, layouts.CANONICAL)
    w, others = terms(weight)
    return call_dequantize(w, dtype, *others)


def _same(weight: QuantTensor) -> bool:
    return weight.format.structured and weight.device.type == "cpu"


@alone_after_fork
def call_dequantize(w: Operands, dtype: torch.dtype, *others: Added) -> Tensor:  # (N, K) in `dtype`
    """`dequantize` of the terms of a weight."""
    if not others:
        return _dequantize(*w, dtype)
    checks.check_float("dtype", dtype)
    decoded = _dequantize(*w, torch.float32)
    for term in others:
        if isinstance(term, LowRankOperands):
            decoded = reference.add_low_rank(decoded, *map(_dense, term))
            continue
        checks.check_sparse(*term, w.k, decoded.device)
        decoded = reference.add_outliers(decoded, *term)
    return decoded.to(dtype)


def _dense(factor: Tensor | Operands) -> Tensor:
    """A factor of a low-rank term in fp32."""
    return factor.float() if isinstance(factor, Tensor) else _dequantize(*factor, torch.float32)


def embedding(indices: Tensor, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the weight: (*indices.shape, K) in `dtype`.

    Raises:
        TypeError: indices are not int64 or int32, or `dtype` is not fp32, bf16 or fp16.
        IndexError: an index is outside [0, N). On a GPU, where looking at them would wait for it and break the capture
            of a graph, torch's assertion stops the device before a row is read, as in torch.nn.functional.embedding.
    """
    w, others = terms(weight)
    return call_embedding(indices, w, dtype, *others)


def call_embedding(indices: Tensor, w: Operands, dtype: torch.dtype, *others: Added) -> Tensor:
    """`embedding` on the terms of a weight."""
    checks.check_tensors(indices=indices)
    if not others:
        return _embedding(indices, *w, dtype)
    return _composite_embedding(indices, w, dtype, *others)


# A node of torch.fx graphs: it looks at what a traced tensor does not have.
torch.fx.wrap("call_embedding")


@alone_after_fork
def _composite_embedding(
    indices: Tensor, w: Operands, dtype: torch.dtype, *others: Added
) -> Tensor:  # (*indices.shape, K) in `dtype`
    checks.check_float("dtype", dtype)
    rows = indices.reshape(-1)
    found = _embedding(rows, *w, torch.float32)
    for term in others:
        if isinstance(term, LowRankOperands):
            left, right = term
            taken = (
                left[rows] if isinstance(left, Tensor) else _embedding(rows, *left, torch.float32)
            )
            found = reference.add_low_rank(found, taken, _dense(right))
        else:
            found = reference.add_outliers(found, term.columns[rows], term.values[rows])
    return shaped(found.to(dtype), *indices.shape, found.shape[1])


def _check_dequantize(w: Operands, dtype: torch.dtype) -> None:
    checks.refuse_grad("dequantize", *w.tensors)
    checks.check_float("dtype", dtype)
    checks.check_weight(w, w.codes.device)


@alone_after_fork
def _dequantize_impl(w: Operands, dtype: torch.dtype) -> Tensor:
    _check_dequantize(w, dtype)
    return backends.find(w.codes.device.type, w.layout).dequantize(w, dtype)


def _dequantize_fake(w: Operands, dtype: torch.dtype) -> Tensor:
    _check_dequantize(w, dtype)
    return w.codes.new_empty(w.shape, dtype=dtype)


def _check_embedding(indices: Tensor, w: Operands, dtype: torch.dtype) -> None:
    checks.refuse_grad("embedding", *w.tensors)
    checks.check_indices(indices)
    checks.check_float("dtype", dtype)
    checks.check_weight(w, indices.device)


@alone_after_fork
def _embedding_impl(indices: Tensor, w: Operands, dtype: torch.dtype) -> Tensor:
    _check_embedding(indices, w, dtype)
    rows = contiguous(indices.reshape(-1).to(torch.int64))
    _check_range(rows, w.n)
    y = backends.find(indices.device.type, w.layout).embedding(rows, w, dtype)
    return shaped(y, *indices.shape, w.k)


def _check_range(rows: Tensor, n: int) -> None:
    """Checks that rows are in [0, n), on a GPU without waiting for it."""
    if rows.numel() == 0:
        return
    if rows.device.type in _ASSERTING:
        torch._assert_async(((rows >= 0) & (rows < n)).all(), f"indices must be in [0, {n})")
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= n:
        raise IndexError(f"indices must be in [0, {n}), got {low if low < 0 else high}")


def _embedding_fake(indices: Tensor, w: Operands, dtype: torch.dtype) -> Tensor:
    _check_embedding(indices, w, dtype)
    return w.codes.new_empty((*indices.shape, w.k), dtype=dtype)


@alone_after_fork
def _codebook_grad_impl(
    grad_weight: Tensor, w: Operands, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_weight.dtype != torch.float32 or grad_weight.shape != w.shape:
        raise ValueError(
            f"grad_weight must be float32 of shape {w.shape}, got {grad_weight.dtype} of shape "
            f"{tuple(grad_weight.shape)}"
        )
    checks.check_weight(w, grad_weight.device)
    return gradients.codebook_grad(grad_weight, w, wanted)


def _codebook_grad_fake(
    grad_weight: Tensor, w: Operands, wanted: list[bool]
) -> tuple[Tensor | Any, ...]:
    return tuple(
        torch.empty_like(t) if want and t is not None else grad_weight.new_empty(0)
        for t, want in zip((w.scales, w.zeros, w.table), wanted, strict=True)
    )


@alone_after_fork
def _pack_impl(codes: Tensor, spec: str) -> Tensor:
    format = checks.check_codes(codes, spec)
    if codes.numel() and (highest := int(codes.max())) >= format.num_codes:
        raise ValueError(
            f"codes must be below {format.num_codes} in format {format.name!r}, got {highest}"
        )
    return backends.of_device(codes.device.type).pack(codes, format)


def _pack_fake(codes: Tensor, spec: str) -> Tensor:
    format = checks.check_codes(codes, spec)
    n, k = codes.shape
    return codes.new_empty((n, format.row_bytes(k)))


@alone_after_fork
def _unpack_impl(packed: Tensor, spec: str, k: int) -> Tensor:
    format = checks.check_packed(packed, spec, k)
    return backends.of_device(packed.device.type).unpack(packed, format, k)


def _unpack_fake(packed: Tensor, spec: str, k: int) -> Tensor:
    checks.check_packed(packed, spec, k)
    return packed.new_empty((packed.shape[0], k))


_dequantize = library.op(
    "dequantize",
    "({W}, ScalarType dtype) -> Tensor",
    _dequantize_impl,
    _dequantize_fake,
    transform=autograd.transformed_dequantize,
)
_embedding = library.op(
    "embedding",
    "(Tensor indices, {W}, ScalarType dtype) -> Tensor",
    _embedding_impl,
    _embedding_fake,
    any_batch=True,
)
library.op(
    "codebook_grad",
    "(Tensor grad_weight, {W}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _codebook_grad_impl,
    _codebook_grad_fake,
    transform=autograd.transformed_codebook_grad,
)
library.op("pack", "(Tensor codes, str format) -> Tensor", _pack_impl, _pack_fake)
library.op("unpack", "(Tensor packed, str format, SymInt k) -> Tensor", _unpack_impl, _unpack_fake)
