"""int8 activations: `quantize`, `linear` and `requantize`, and the ops torch.ops.lowbit.int8_quantize and int8_linear.

What they compute is stated in `reference.quantize_int8` and `reference.int8_linear`, bit for bit. A format with
activation "int8" or "int8_table" does both inside `lowbit.linear`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit import backends
from lowbit.formats import Format
from lowbit.layouts import Operands
from lowbit.layouts.n16 import CHUNK_K
from lowbit.ops import checks, library
from lowbit.ops.linear import autocast
from lowbit.ops.terms import Weight, matrix
from lowbit.strides import contiguous, rows_of, shaped


def quantize(
    x: Tensor, group: int | None = None, scale: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization of activations: x is about q * scales.

    Args:
        x: (M, K) in fp32, bf16 or fp16.
        group: a scale for every `group` values of a row, instead of one for the row.
        scale: static: a number or an fp32 tensor of one or M elements, positive; q saturates at -127 and 127.

    Returns:
        q (M, K) int8, rounded to nearest even, and fp32 scales: (M,), or (M, ceil(K / group)). Without `scale` they
        are absmax / 127; those of a group with NaN or infinity are not finite and its q is 0. With `scale` they are
        that, but NaN for a row with NaN, and infinity saturates as any number does.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: x is not 2-D or empty along K, group is below 1 or given with `scale`, or a scale is not positive
            and finite or of another shape.
    """
    checks.check_tensors(x=x)
    if scale is not None:
        scale = _static_scale(scale, x)
    return _quantize(x, group, scale)


def linear(
    q: Tensor,
    x_scales: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> Tensor:
    """(q * x_scales) W^T + bias, with the products and the sum of every group exact in int32.

    Args:
        q: (M, K) int8.
        x_scales: fp32 (M,); (M, ceil(K / block)) if the weight's format has blocks (`activation_group`), else
            (M, groups) with the groups of the weight, which are then multiples of 32.
        weight: (N, K); its table must be exact in int8 unless its format has activation "int8_table".
        bias: (N,) in fp32, bf16 or fp16.
        out_dtype: fp32, bf16, fp16, or int8 with `out_scale`.
        out_scale: the scale of an int8 result: y * (1 / out_scale) to nearest even, saturated to -128 .. 127. int8
            has no NaN: it becomes 0.

    Returns:
        (M, N) in `out_dtype`. No gradients.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape, device or layout does not fit, the table is not exact in int8, or `out_scale` is missing,
            superfluous or not positive.
    """
    w = matrix(weight)
    checks.check_tensors(q=q, x_scales=x_scales)
    checks.check_optional(bias=bias)
    return _linear(q, x_scales, *w, bias, out_dtype, out_scale)


def static_linear(x: Tensor, x_scale: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`lowbit.linear` with x quantized by one given scale in place of absmax / 127 of each row.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        x_scale: one fp32 element on the device of x, positive and finite (not checked: under
            torch.compile it has no value).
        weight, bias: as in `linear`.

    Returns:
        (..., N) in the dtype of x. No gradients. NaN in a row of x makes its results NaN.
    """
    w = matrix(weight)
    checks.check_tensors(x_scale=x_scale)
    checks.check_optional(bias=bias)
    return call_static_linear(x, x_scale, w, bias)


def call_static_linear(x: Tensor, x_scale: Tensor, w: Operands, bias: Tensor | None) -> Tensor:
    """`static_linear` on operands."""
    x = autocast(x)
    if x.dim() == 0 or x.shape[-1] != w.k:
        raise ValueError(f"x must have shape (..., {w.k}), got {tuple(x.shape)}")
    rows = x.reshape(-1, w.k)
    q, x_scales = _quantize(rows, None, x_scale.expand(rows.shape[0]).contiguous())
    return shaped(_linear(q, x_scales, *w, bias, x.dtype, None), *x.shape[:-1], w.n)


def dyadic(factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """The dyadic number nearest to a factor: multiplier / 2^31 / 2^shift.

    Args:
        factor: not negative and below 2^31, as input scale * weight scale / output scale; any shape.

    Returns:
        multiplier int32, from 2^30 to 2^31 - 1, rounded with ties up, and shift int32, -31 to 31 (left if negative).
        A factor below 2^-32 gives 0 and 0, as in TFLite.

    Raises:
        ValueError: a factor is negative, not finite or too large.
    """
    if isinstance(factor, Tensor):
        f = factor.to(torch.float64)
    else:
        f = torch.tensor(factor, dtype=torch.float64, device="cpu")
    if not bool(((f >= 0) & (f < 2**31)).all()):
        raise ValueError(f"factor must be 0 or more and below 2^31, got {factor!r:.200}")
    mantissa, exponent = torch.frexp(f)
    # Exact in fp64: the mantissa has 53 bits.
    multiplier = (mantissa * 2**31 + 0.5).floor().long()
    carry = multiplier == 2**31
    multiplier, shift = torch.where(carry, 2**30, multiplier), -(exponent + carry)
    lost = (shift > 31) | (multiplier == 0)
    multiplier, shift = multiplier.masked_fill(lost, 0), shift.masked_fill(lost, 0)
    if bool((shift < -31).any()):
        raise ValueError(f"factor must be below 2^31 when rounded, got {factor!r:.200}")
    return multiplier.to(torch.int32), shift.to(torch.int32)


def requantize(
    acc: Tensor, multiplier: Tensor, shift: Tensor, zero_point: int = 0, low: int = -128
) -> Tensor:
    """int32 sums to int8 in integers alone: acc * multiplier / 2^31 / 2^shift + zero_point, saturated.

    Bit for bit gemmlowp, whose rule TFLite and I-ViT (arXiv 2207.01405) use: the product over 2^31 is rounded to
    nearest, ties towards plus infinity (SaturatingRoundingDoublingHighMul, the VQRDMULH of Arm), and that, over
    2^shift, to nearest again, ties away from zero (RoundingDivideByPOT). A left shift comes before the product and
    saturates to int32 (our reading).

    Args:
        acc: (..., N) int32.
        multiplier, shift: int32 of one element, or (N,) for a factor per channel, from `dyadic`.
        zero_point: of the result, -128 to 127.
        low: results below it become it; `zero_point` makes it a ReLU.

    Returns:
        (..., N) int8.

    Raises:
        TypeError: a dtype is not int32.
        ValueError: a shape, a device or a number does not fit.
    """
    for name, t in (("acc", acc), ("multiplier", multiplier), ("shift", shift)):
        checks.check_tensors(**{name: t})
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
    n = acc.shape[-1] if acc.dim() else 1
    for name, t, least in (("multiplier", multiplier, 0), ("shift", shift, -31)):
        if t.device != acc.device or (t.numel() != 1 and t.shape != (n,)):
            raise ValueError(
                f"{name} must have one element or shape ({n},) on {acc.device}, got "
                f"{tuple(t.shape)} on {t.device}"
            )
        if bool((t < least).any()) or (name == "shift" and bool((t > 31).any())):
            raise ValueError(f"{name} must be {least} to {31 if least else 2**31 - 1}, got {t}")
    for name, number in (("zero_point", zero_point), ("low", low)):
        if not -128 <= number <= 127:
            raise ValueError(f"{name} must be -128 to 127, got {number}")
    return (rescale(acc, multiplier, shift) + zero_point).clamp(low, 127).to(torch.int8)


def rescale(acc: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """acc * multiplier / 2^31 / 2^shift as `requantize` rounds it, before the zero point, of numbers that are checked.

    Args:
        acc: of any integer dtype, with values of int32.
        multiplier, shift: from `dyadic`, of shapes that go with that of acc.

    Returns:
        int64, with values of int32.
    """
    bounds = torch.iinfo(torch.int32)
    by = shift.long()
    left = (acc.long() << (-by).clamp(min=0)).clamp(bounds.min, bounds.max)
    product = (left * multiplier + 2**30) >> 31
    right = by.clamp(min=0)
    nudge = torch.where(right > 0, (1 << right >> 1) - (product < 0).long(), 0)
    return (product + nudge) >> right


def _static_scale(scale: float | Tensor, x: Tensor) -> Tensor:
    m = x.shape[0] if x.dim() else 0
    values = torch.as_tensor(scale, dtype=torch.float32, device=x.device).flatten()
    if values.numel() not in (1, m):
        raise ValueError(f"scale must have 1 or {m} elements, got {values.numel()}")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"scale must be positive and finite, got {scale!r:.200}")
    return values.expand(m).contiguous()


def _check_quantize(x: Tensor, group: int | None, scale: Tensor | None) -> None:
    checks.check_float("x", x.dtype)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (M, K) with K >= 1, got {tuple(x.shape)}")
    if group is not None and (group < 1 or scale is not None):
        why = "None with a static scale" if scale is not None else "positive"
        raise ValueError(f"group must be {why}, got {group}")
    if scale is not None and (
        scale.dtype != torch.float32 or scale.shape != x.shape[:1] or not scale.is_contiguous()
    ):
        raise ValueError(
            f"scale must be a contiguous float32 of shape ({x.shape[0]},), got {scale.dtype} of shape "
            f"{tuple(scale.shape)}"
        )
    checks.refuse_grad("int8_quantize", x, scale)


def _check_linear(
    q: Tensor,
    x_scales: Tensor,
    w: Operands,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_scale: float | None,
) -> None:
    format = w.format
    if format.activation is None and (format.int8_step is None or format.table_scope != "tensor"):
        raise ValueError(
            f"format {format.name!r}: its table is not exact in int8; activation 'int8_table' (suffix _a8t) "
            "rounds it"
        )
    if q.dtype != torch.int8:
        raise TypeError(f"q must be int8, got {q.dtype}")
    if q.dim() != 2 or q.shape[1] != w.k:
        raise ValueError(f"q must have shape (M, {w.k}), got {tuple(q.shape)}")
    _check_x_scales(q, x_scales, format)
    if bias is not None:
        checks.check_bias(bias, w.n, q.device)
    if out_dtype != torch.int8:
        checks.check_float("out_dtype", out_dtype)
    if (out_dtype == torch.int8) != (out_scale is not None):
        raise ValueError(
            f"out_scale must be given with out_dtype int8 and only then, got {out_scale}"
        )
    if out_scale is not None and not (out_scale > 0 and math.isfinite(out_scale)):
        raise ValueError(f"out_scale must be positive and finite, got {out_scale}")
    checks.refuse_grad("int8_linear", x_scales, *w.tensors, bias)
    checks.check_weight(w, q.device)


def _check_x_scales(q: Tensor, x_scales: Tensor, format: Format) -> None:
    m, k = q.shape
    if x_scales.dtype != torch.float32:
        raise TypeError(f"x_scales must be float32, got {x_scales.dtype}")
    own = format.activation_group is not None
    blocks = format.num_blocks(k) if own else format.num_groups(k)
    shape = (m,) if x_scales.dim() < 2 else (m, blocks)
    if x_scales.shape != shape or x_scales.device != q.device:
        raise ValueError(
            f"x_scales must have shape ({m},) or ({m}, {blocks}) on {q.device}, got "
            f"{tuple(x_scales.shape)} on {x_scales.device}"
        )
    if not own and x_scales.dim() == 2 and format.group is not None and format.group % CHUNK_K:
        raise ValueError(
            f"x_scales by group need groups that are multiples of {CHUNK_K}, got {format.group} in "
            f"format {format.name!r}"
        )


def _quantize_impl(x: Tensor, group: int | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group, scale)
    backend = backends.of_device(x.device.type)
    return backend.int8_quantize(rows_of(x, x.shape[1]), group, scale)


def _quantize_fake(x: Tensor, group: int | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group, scale)
    m, k = x.shape
    shape = (m,) if group is None else (m, -(-k // group))
    return x.new_empty((m, k), dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


def _linear_impl(
    q: Tensor,
    x_scales: Tensor,
    w: Operands,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_scale: float | None,
) -> Tensor:
    _check_linear(q, x_scales, w, bias, out_dtype, out_scale)
    q, x_scales, bias = rows_of(q, w.k), contiguous(x_scales), contiguous(bias)
    backend = backends.find(q.device.type, w.layout)
    return backend.int8_linear(q, x_scales, w, bias, out_dtype, out_scale)


def _linear_fake(
    q: Tensor,
    x_scales: Tensor,
    w: Operands,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_scale: float | None,
) -> Tensor:
    _check_linear(q, x_scales, w, bias, out_dtype, out_scale)
    return q.new_empty((q.shape[0], w.n), dtype=out_dtype)


_quantize = library.op(
    "int8_quantize",
    "(Tensor x, int? group, Tensor? scale) -> (Tensor, Tensor)",
    _quantize_impl,
    _quantize_fake,
)
_linear = library.op(
    "int8_linear",
    "(Tensor q, Tensor x_scales, {W}, Tensor? bias, ScalarType out_dtype, float? out_scale) -> Tensor",
    _linear_impl,
    _linear_fake,
)
