"""Binary activations for binary weights: `quantize` and `linear`, and their ops torch.ops.lowbit.binary_quantize and
binary_linear.

The products of XNOR-Net (Rastegari et al. 2016, arXiv 1603.05279): x is about scale * sign(x), and a sum of products
of signs is K - 2 * popcount(x xor w).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import backends
from lowbit.layouts import Operands
from lowbit.layouts.n16 import CHUNK_K
from lowbit.ops import checks, library
from lowbit.ops.terms import Weight, matrix
from lowbit.strides import contiguous, rows_of


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and one scale for each row: x is about scales * (2 * bit - 1).

    Args:
        x: (M, K) in fp32, bf16 or fp16.

    Returns:
        bits (M, ceil(K / 8)) uint8: bit k % 8 of byte k // 8 says whether x[m, k] >= 0, bits beyond K are 0; and
        scales (M,) fp32, the mean of |x|, which is the least-squares scale. NaN has bit 0 and makes its scale NaN.

    Raises:
        TypeError: x has another dtype.
        ValueError: x is not 2-D or empty along K.
    """
    checks.check_tensors(x=x)
    return _quantize(x)


def linear(
    bits: Tensor,
    x_scales: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x_scales * signs) W^T + bias, with the sum of every group exact in int32.

    Bit for bit `lowbit.int8.linear` on the signs as int8.

    Args:
        bits: (M, ceil(K / 8)) uint8, as `quantize` returns them; bits beyond K are ignored.
        x_scales: (M,) fp32.
        weight: (N, K) with 1 bit and the table (-1, 1), such as "binary"; groups are multiples of 32 or the row.
        bias: (N,) in fp32, bf16 or fp16.
        out_dtype: fp32, bf16 or fp16.

    Returns:
        (M, N) in `out_dtype`. No gradients.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape, device, layout or the format does not fit.
    """
    checks.check_tensors(bits=bits, x_scales=x_scales)
    checks.check_optional(bias=bias)
    return call_linear(bits, x_scales, matrix(weight), bias, out_dtype)


def call_linear(
    bits: Tensor, x_scales: Tensor, w: Operands, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`linear` on operands."""
    return _linear(bits, x_scales, *w, bias, out_dtype)  # type: ignore[no-any-return]


def _check_quantize(x: Tensor) -> None:
    checks.check_float("x", x.dtype)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (M, K) with K >= 1, got {tuple(x.shape)}")
    checks.refuse_grad("binary_quantize", x)


def _check_linear(
    bits: Tensor, x_scales: Tensor, w: Operands, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    format, k = checks.check_weight(w, bits.device), w.k
    if format.bits != 1 or format.table != (-1.0, 1.0):
        raise ValueError(
            f"weight must have 1 bit and the table (-1, 1), such as 'binary', got format {format.name!r}"
        )
    if format.group is not None and format.group < k and format.group % CHUNK_K:
        raise ValueError(
            f"groups must be multiples of {CHUNK_K}, got {format.group} in format {format.name!r}"
        )
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits must be uint8, got {bits.dtype}")
    if bits.dim() != 2 or bits.shape[1] != -(-k // 8):
        raise ValueError(
            f"bits must have shape (M, {-(-k // 8)}) for K = {k}, got {tuple(bits.shape)}"
        )
    if x_scales.dtype != torch.float32:
        raise TypeError(f"x_scales must be float32, got {x_scales.dtype}")
    if x_scales.shape != bits.shape[:1] or x_scales.device != bits.device:
        raise ValueError(
            f"x_scales must have shape ({bits.shape[0]},) on {bits.device}, got "
            f"{tuple(x_scales.shape)} on {x_scales.device}"
        )
    if bias is not None:
        checks.check_bias(bias, w.n, bits.device)
    checks.check_float("out_dtype", out_dtype)
    checks.refuse_grad("binary_linear", x_scales, *w.tensors, bias)


def _quantize_impl(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    return backends.of_device(x.device.type).binary_quantize(rows_of(x, x.shape[1]))


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    m, k = x.shape
    return x.new_empty((m, -(-k // 8)), dtype=torch.uint8), x.new_empty((m,), dtype=torch.float32)


def _linear_impl(
    bits: Tensor, x_scales: Tensor, w: Operands, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_linear(bits, x_scales, w, bias, out_dtype)
    bits, x_scales, bias = rows_of(bits, bits.shape[1]), contiguous(x_scales), contiguous(bias)
    backend = backends.find(bits.device.type, w.layout)
    return backend.binary_linear(bits, x_scales, w, bias, out_dtype)


def _linear_fake(
    bits: Tensor, x_scales: Tensor, w: Operands, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check_linear(bits, x_scales, w, bias, out_dtype)
    return bits.new_empty((bits.shape[0], w.n), dtype=out_dtype)


_quantize = library.op(
    "binary_quantize", "(Tensor x) -> (Tensor, Tensor)", _quantize_impl, _quantize_fake
)
_linear = library.op(
    "binary_linear",
    "(Tensor bits, Tensor x_scales, {W}, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _linear_impl,
    _linear_fake,
)
