"""`scaled_mm`, the product of two FP8 matrices, and its ops torch.ops.lowbit.fp8_scaled_mm*.

What it computes is stated in `reference/fp8.py`; kernels sum in fp32 and scale the sums of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends import fp8 as backends
from lowbit.float8 import FLOAT8, Scaled, check_float8, find_granularity, scaled
from lowbit.ops import checks, library
from lowbit.ops.fp8 import quantize
from lowbit.strides import contiguous, rows_of

_OPERANDS = "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias"
_REQUANTIZED = ("row", "1x16")


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    requantize: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (a * scale_a) (b * scale_b)^T + bias, with sums in fp32 and one rounding at the end.

    Any granularity may meet any other: the shape and the dtype of a scale say which it is (`quantize`). Any M, N and K
    will do, and all four pairs of types, E5M2 with E5M2 too. Scales multiply the sums of their groups and are not
    checked: NaN makes what it scales NaN, 0 makes it 0, a negative scale turns signs.

    Args:
        a: (M, K) in float8_e4m3fn or float8_e5m2, any strides; rows of unit stride are read in place, without a copy.
        b: (N, K), likewise.
        scale_a, scale_b: fp32, bf16, or E8M0 for "mx".
        bias: (N,) in fp32, bf16 or fp16.
        out_dtype: fp32, bf16 (the default) or fp16; with `requantize` float8_e4m3fn (the default) or float8_e5m2.
        requantize: "row" or "1x16": y in fp32 is quantized with scales of that granularity.

    Returns:
        (M, N) in `out_dtype`; with `requantize` what `quantize` returns of it, q and its scales. No gradients.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: K of a and b differ or is 0, the shape of a scale fits no granularity, the bias is not (N,), tensors
            are on different devices, or `requantize` has another name.
    """
    checks.check_tensors(a=a, b=b, scale_a=scale_a, scale_b=scale_b)
    checks.check_optional(bias=bias)
    if requantize is None:
        return _scaled_mm(a, b, scale_a, scale_b, bias, out_dtype or torch.bfloat16)
    check_requantize(requantize)
    dtype = out_dtype or torch.float8_e4m3fn
    if dtype not in FLOAT8:
        raise TypeError(f"out_dtype must be {list(FLOAT8)} with requantize, got {dtype}")
    q, scale = _scaled_mm_quantized(a, b, scale_a, scale_b, bias, dtype, requantize)
    return q, scale


def check_requantize(name: str) -> None:
    """Raises ValueError unless y can be quantized with scales of this granularity."""
    if name not in _REQUANTIZED:
        raise ValueError(f"requantize must be None or one of {_REQUANTIZED}, got {name!r}")


def check(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Scaled, Scaled]:
    """Checks a, b, their scales and the bias, and returns a and b with what their scales are."""
    for name, t in (("a", a), ("b", b)):
        check_float8(name, t.dtype)
        if t.dim() != 2 or t.shape[1] < 1:
            raise ValueError(f"{name} must have shape (rows, K) with K >= 1, got {tuple(t.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a (M, K) and b (N, K) must have the same K, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, t in (("b", b), ("scale_a", scale_a), ("scale_b", scale_b)):
        if t.device != a.device:
            raise ValueError(f"{name} must be on {a.device} as a, got {t.device}")
    checks.check_float("out_dtype", out_dtype)
    if bias is not None:
        checks.check_bias(bias, b.shape[0], a.device)
    checks.refuse_grad("fp8_scaled_mm", a, b, scale_a, scale_b, bias)
    return scaled(a, scale_a, "scale_a"), scaled(b, scale_b, "scale_b")


def ready(s: Scaled) -> Scaled:
    """Values with unit stride along K, scales contiguous."""
    return Scaled(rows_of(s.q, s.q.shape[1]), contiguous(s.scale), s.granularity)


def _impl(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    left, right = check(a, b, scale_a, scale_b, bias, out_dtype)
    backend, _ = backends.product(left, right)
    return backend.scaled_mm(ready(left), ready(right), contiguous(bias), out_dtype)


def _quantized_impl(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    granularity: str,
) -> tuple[Tensor, Tensor]:
    left, right = check(a, b, scale_a, scale_b, bias, torch.float32)
    fused = backends.quantizing_product(left, right, granularity)
    if fused is not None:
        return fused(ready(left), ready(right), contiguous(bias), out_dtype)
    q, scale = quantize(_impl(a, b, scale_a, scale_b, bias, torch.float32), out_dtype, granularity)
    return q, scale


def _fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    check(a, b, scale_a, scale_b, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _quantized_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    granularity: str,
) -> tuple[Tensor, Tensor]:
    check(a, b, scale_a, scale_b, bias, torch.float32)
    m, n = a.shape[0], b.shape[0]
    shape = find_granularity(granularity).scale_shape(m, n)
    return a.new_empty((m, n), dtype=out_dtype), a.new_empty(shape, dtype=torch.float32)


_scaled_mm = library.op(
    "fp8_scaled_mm", f"({_OPERANDS}, ScalarType out_dtype) -> Tensor", _impl, _fake
)
_scaled_mm_quantized = library.op(
    "fp8_scaled_mm_quantized",
    f"({_OPERANDS}, ScalarType out_dtype, str granularity) -> (Tensor, Tensor)",
    _quantized_impl,
    _quantized_fake,
)
