"""torch.ops.lowbit.*: schemas, fakes and autograd, each once, and the functions that call them.

Operands (codes, scales, zeros, table) of an (n, k) weight lie as `layouts/` says for `layout`;
`format` is `Format.spec`. `linear`, `dequantize` and `embedding` refuse inputs that require grad; a
separate `linear_trainable` has gradients for x, bias, scales, float zeros and table, because
autograd adds 2.7 us to a call. `linear_outliers` and `linear_outliers_trainable` take the outliers
of a weight beside the operands of its format without them; the other ops refuse such formats.
Importing this module registers the ops, which `import lowbit` alone does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from lowbit import (
    autograd,
    backends,
    checks,
    fused,
    gradients,
    layouts,
    modes,
    outliers,
    reference,
    transforms,
    weight_ops,
)
from lowbit.layouts import Operands
from lowbit.strides import contiguous, rows_of, shaped
from lowbit.weights.quantized import QuantTensor

_WEIGHT = "Tensor codes, Tensor? scales, Tensor? zeros, Tensor? table"
_MEANING = "str format, str layout, SymInt n, SymInt k"
_LINEAR = f"(Tensor x, {_WEIGHT}, Tensor? bias, {_MEANING}) -> Tensor"
_OUTLIERS = "Tensor outlier_columns, Tensor outlier_values"
_SCHEMAS = {
    "linear": _LINEAR,
    "linear_trainable": _LINEAR,
    "linear_epilogue": (
        f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? gate, Tensor? residual, {_MEANING}, "
        "str? activation) -> Tensor"
    ),
    "linear_outliers": (
        f"(Tensor x, {_WEIGHT}, Tensor? bias, {_MEANING}, {_OUTLIERS}, Tensor? gate, "
        "Tensor? residual, str? activation) -> Tensor"
    ),
    "linear_outliers_trainable": (
        f"(Tensor x, {_WEIGHT}, Tensor? bias, {_MEANING}, {_OUTLIERS}) -> Tensor"
    ),
    "linear_siblings": "(Tensor x, int group) -> Tensor[]",
    "linear_many": (
        "(Tensor x, Tensor[] codes, Tensor?[] scales, Tensor?[] zeros, Tensor?[] table, "
        "Tensor?[] bias, str[] format, str layout, SymInt[] n, SymInt k) -> Tensor[]"
    ),
    "dequantize": f"({_WEIGHT}, {_MEANING}, ScalarType dtype) -> Tensor",
    "embedding": f"(Tensor indices, {_WEIGHT}, {_MEANING}, ScalarType dtype) -> Tensor",
    "codebook_grad": (
        f"(Tensor grad_weight, {_WEIGHT}, {_MEANING}, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
    ),
    "pack": "(Tensor codes, str format) -> Tensor",
    "unpack": "(Tensor packed, str format, SymInt k) -> Tensor",
}
_library = torch.library.Library("lowbit", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


_backend = backends.find_cached


def linear(
    x: Tensor,
    weight: QuantTensor | Operands,
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
        weight: (N, K), on the device of x. A QuantTensor keeps the kernel's own copy of itself
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
    w = operands(weight)
    checks.check_optional(bias=bias, gate=gate, residual=residual)
    spec, (n, k) = w.spec_without_outliers, w.shape
    sparse = () if w.outlier_columns is None else (w.outlier_columns, w.outlier_values)
    if activation is None and gate is None and residual is None:
        return call_linear(
            x, w.codes, w.scales, w.zeros, w.table, bias, spec, w.layout, n, k, *sparse
        )
    x = autocast(x)
    gate, residual = (None if t is None else autocast(t) for t in (gate, residual))
    checks.check_epilogue(x, n, activation, gate, residual)
    tensors = (w.codes, w.scales, w.zeros, w.table, bias)
    if modes.in_dual_level() or (
        torch.is_grad_enabled() and checks.requires_grad(x, gate, residual, *tensors[1:])
    ):
        y = call_linear(x, *tensors, spec, w.layout, n, k, *sparse)
        return reference.apply_epilogue(y, activation, gate, residual)
    if sparse:
        meaning = (spec, w.layout, n, k)
        return _linear_outliers(x, *tensors, *meaning, *sparse, gate, residual, activation)
    return _linear_epilogue(x, *tensors, gate, residual, spec, w.layout, n, k, activation)


def linear_many(
    x: Tensor,
    weights: Sequence[QuantTensor | Operands],
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """[x W^T + bias for each weight]: one conversion of x and one parallel region.

    Each result is bit for bit that of `linear`. They are separate calls if a gradient is needed or
    a weight has outliers.

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
    return call_linear_many(x, [operands(w) for w in weights], biases)


def call_linear_many(
    x: Tensor, weights: list[Operands], biases: list[Tensor | None]
) -> list[Tensor]:
    """`linear_many` on operands, with as many biases as weights."""
    x = autocast(x)
    needs_grad = torch.is_grad_enabled() and checks.requires_grad(
        x, *biases, *(t for w in weights for t in (w.scales, w.zeros, w.table))
    )
    layouts_given = {w.layout for w in weights}
    apart = (
        needs_grad or modes.in_dual_level() or any(w.outlier_columns is not None for w in weights)
    )
    if apart or len(layouts_given) != 1:  # also no weights at all
        return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return _linear_many(
        x,
        [w.codes for w in weights],
        [w.scales for w in weights],
        [w.zeros for w in weights],
        [w.table for w in weights],
        biases,
        [w.spec for w in weights],
        layouts_given.pop(),
        [w.shape[0] for w in weights],
        weights[0].shape[1],
    )


def call_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    columns: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`linear` on loose operands: applies autocast, takes the trainable op where grad is needed.

    `spec` is that of the format without outliers, which `columns` and `values` are.
    """
    x = autocast(x)
    # modes.in_dual_level, without a call. What torch.compile traces is the op, which finds its transform itself.
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        sparse = () if columns is None else (columns, values)
        return autograd.Linear.apply(
            x, codes, scales, zeros, table, bias, spec, layout, n, k, *sparse
        )
    needs_grad = torch.is_grad_enabled() and checks.requires_grad(x, scales, zeros, table, bias)
    if columns is None:
        op = _linear_trainable if needs_grad else _linear
        return op(x, codes, scales, zeros, table, bias, spec, layout, n, k)
    product = (x, codes, scales, zeros, table, bias, spec, layout, n, k, columns, values)
    if needs_grad:
        return _linear_outliers_trainable(*product)
    return _linear_outliers(*product, None, None, None)


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


def dequantize(weight: QuantTensor | Operands, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, (N, K): computed in fp32 and rounded once to `dtype` (fp32, bf16 or fp16).

    A QuantTensor is read in its canonical layout, unless it has a copy in the kernel's layout already.
    """
    if isinstance(weight, QuantTensor) and weight._packed is None:
        w = layouts.to_operands(weight, layouts.CANONICAL)
    else:
        w = operands(weight)
    tensors, sparse = (w.codes, w.scales, w.zeros, w.table), (w.outlier_columns, w.outlier_values)
    meaning = (w.spec_without_outliers, w.layout, *w.shape)
    return outliers.dequantize(tensors, meaning, dtype, *sparse)


def embedding(
    indices: Tensor, weight: QuantTensor | Operands, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of the weight: (*indices.shape, K) in `dtype`.

    Raises:
        TypeError: indices are not int64 or int32, or `dtype` is not fp32, bf16 or fp16.
        IndexError: an index is outside [0, N).
    """
    w = operands(weight)
    spec, (n, k) = w.spec_without_outliers, w.shape
    sparse = (w.outlier_columns, w.outlier_values)
    return call_embedding(
        indices, w.codes, w.scales, w.zeros, w.table, spec, w.layout, n, k, dtype, *sparse
    )


def call_embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
    dtype: torch.dtype,
    columns: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`embedding` on loose operands; `spec` as for `call_linear`."""
    checks.check_tensors(indices=indices)
    weight = (codes, scales, zeros, table, spec, layout, n, k)
    if columns is None or values is None:
        return _embedding(indices, *weight, dtype)
    return outliers.embedding(indices, weight, dtype, columns, values)


# Nodes of torch.fx graphs: they look at what a traced tensor does not have.
torch.fx.wrap("call_linear")
torch.fx.wrap("call_embedding")


def operands(weight: QuantTensor | Operands) -> Operands:
    """The weight as its device's kernels read it; a QuantTensor is converted once."""
    if isinstance(weight, Operands):
        return weight
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"weight must be a QuantTensor or Operands, got {type(weight).__name__}")
    if weight._packed is None:
        weight._packed = backends.available.kernel_operands(weight)
    return weight._packed  # type: ignore[return-value]


def _linear_impl(
    device_type: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
) -> Tensor:
    plan = backends.cpu.plan(spec, layout, n, k)
    if plan is not None:
        threads = torch.get_num_threads()
        y = backends.cpu.linear_tensors(plan, threads, x, codes, scales, zeros, table, bias)
        if y is not None:
            return y
    # Something is unusual or wrong: the checks in Python find out.
    format = checks.check_linear(x, codes, scales, zeros, table, bias, spec, layout, n, k)
    backend, bias = _backend(device_type, layout), contiguous(bias)
    y = backend.linear(rows_of(x, k), codes, scales, zeros, table, bias, format, n, k)
    return shaped(y, *x.shape[:-1], n)


def _inference_linear_impl(
    device_type: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: str,
    layout: str,
    n: int,
    k: int,
) -> Tensor:
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        checks.refuse_grad("linear", x, codes, scales, zeros, table, bias)
    return _linear_impl(device_type, x, codes, scales, zeros, table, bias, spec, layout, n, k)


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    checks.check_linear(x, *args)
    return x.new_empty((*x.shape[:-1], args[-2]))


def _inference_linear_fake(x: Tensor, *args: Any) -> Tensor:
    checks.refuse_grad("linear", x, *args[:5])
    return _linear_fake(x, *args)


_IMPLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (_inference_linear_impl, _inference_linear_fake),
    "linear_trainable": (_linear_impl, _linear_fake),
    "linear_epilogue": (fused.linear_epilogue_impl, fused.linear_epilogue_fake),
    "linear_outliers": (outliers.linear_outliers_impl, outliers.linear_outliers_fake),
    "linear_outliers_trainable": (
        outliers.linear_outliers_trainable_impl,
        outliers.linear_outliers_trainable_fake,
    ),
    "linear_siblings": (fused.linear_siblings_impl, fused.linear_siblings_fake),
    "linear_many": (fused.linear_many_impl, fused.linear_many_fake),
    "dequantize": (weight_ops.dequantize_impl, weight_ops.dequantize_fake),
    "embedding": (weight_ops.embedding_impl, weight_ops.embedding_fake),
    "codebook_grad": (weight_ops.codebook_grad_impl, weight_ops.codebook_grad_fake),
    "pack": (weight_ops.pack_impl, weight_ops.pack_fake),
    "unpack": (weight_ops.unpack_impl, weight_ops.unpack_fake),
}
for _name, (_impl, _fake) in _IMPLS.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, functools.partial(_impl, _key.lower()), _key)
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_library)


for _name in ("linear_trainable", "linear_outliers_trainable"):
    torch.library.register_autograd(
        f"lowbit::{_name}", autograd.backward, setup_context=autograd.setup_context, lib=_library
    )
_TRANSFORMED: dict[str, Callable[..., Any]] = {
    "linear": autograd.Linear.apply,
    "linear_trainable": autograd.Linear.apply,
    "linear_outliers_trainable": autograd.Linear.apply,
    "linear_outliers": autograd.transformed_outliers,
    "linear_epilogue": autograd.transformed_epilogue,
    "linear_many": autograd.transformed_many,
    "linear_siblings": autograd.transformed_siblings,
    "dequantize": autograd.transformed_dequantize,
    "codebook_grad": gradients.codebook_grad,
}
for _name, _call in _TRANSFORMED.items():
    transforms.register(_library, _name, _call)
for _name in ("embedding", "pack", "unpack"):
    transforms.register_opaque(_library, _name, any_batch=_name == "embedding")
# Looking an overload up costs as much as a small call.
_linear = torch.ops.lowbit.linear.default
_linear_trainable = torch.ops.lowbit.linear_trainable.default
_linear_epilogue = torch.ops.lowbit.linear_epilogue.default
_linear_outliers = torch.ops.lowbit.linear_outliers.default
_linear_outliers_trainable = torch.ops.lowbit.linear_outliers_trainable.default
linear_siblings = torch.ops.lowbit.linear_siblings.default
_linear_many = torch.ops.lowbit.linear_many.default
_embedding = torch.ops.lowbit.embedding.default
