"""`quantize`, `dequantize`, `absmax` and `cast`, and their ops torch.ops.lowbit.fp8_*.

What they compute is stated in `reference/fp8.py`, bit for bit on every device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import fp8 as backends
from lowbit.float8 import Granularity, check_float8, find_granularity, infer_granularity
from lowbit.ops import checks, library
from lowbit.strides import contiguous, rows_of, shaped

_MAX_SEED = 2**63 - 1


def quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    granularity: str = "tensor",
    *,
    scale_dtype: torch.dtype | None = None,
    transposed: bool = False,
    rounding: str = "nearest",
    seed: int | None = None,
    maxima: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """FP8 quantization with a scale for each block: x is about q.float() * scale.

    scale = absmax / FP8_MAX (448 or 57344) and q = x / scale in fp32, rounded and saturated. COAT (arXiv 2410.19313)
    adds 1e-10 to absmax; here a block whose scale would be 0 has scale 1, and q is 0. For "mx" the scale is 2^e, with
    e = floor(log2(absmax)) - emax (8 or 15) clamped to -127 .. 127 (OCP MX 1.0, 6.3).

    A block with infinity has an infinite scale, its infinities become NaN and the rest 0; with NaN, or either one in
    "mx", scale and q are NaN. NaN has the code 0x7f.

    Args:
        x: (..., K) in fp32, bf16 or fp16, any strides. R is the product of the leading dimensions.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        granularity: "tensor", "row", "1x16", "1x128", "128x128" or "mx" (1x32): rows x columns of a block.
        scale_dtype: fp32 (the default) or bf16, to which scales are rounded up before they divide; E8M0 in "mx".
        transposed: also return the transposed codes; x is 2-D. Their scales are those of q, transposed.
        rounding: "nearest" (ties to even) or "stochastic": up with a probability of the distance from below, in
            steps of the FP8 type.
        seed: of the noise, 0 .. 2^63 - 1; the noise depends on it, the row and the column alone. By default drawn
            from torch's generator, which breaks graphs of torch.compile.
        maxima: fp32 of `absmax(x, granularity)`, if they are known: x is then read once. For "tensor" also those of
            any other granularity, whose maximum is taken (COAT's two-stage group scaling).

    Returns:
        q, of the shape of x and contiguous, and scale, of shape () for "tensor", (R, 1) for "row", (R, ceil(K / 16)),
        (R, ceil(K / 128)), (ceil(R / 128), ceil(K / 128)), and for "mx" (R, ceil(K / 32)). With `transposed` also
        q^T, (K, R) contiguous. No gradients.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: granularity or rounding has another name, a shape does not fit, `seed` is out of range or given
            with "nearest".
    """
    checks.check_tensors(x=x)
    checks.check_optional(maxima=maxima)
    g = find_granularity(granularity)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if rounding == "nearest" and seed is not None:
        raise ValueError(f"seed must be None unless rounding is 'stochastic', got {seed}")
    if seed is not None and not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed must be in 0 .. 2^63 - 1, got {seed}")
    if rounding == "stochastic" and seed is None:
        seed = int(torch.randint(_MAX_SEED, (), dtype=torch.int64, device="cpu"))
    if maxima is not None and g.rows is None and maxima.dim():
        maxima = maxima.amax() if maxima.numel() else maxima.new_zeros(())
    q, scale, q_t = _quantize(
        x, maxima, dtype, granularity, scale_dtype or g.scale_dtypes[0], transposed, seed
    )
    return (q, scale, q_t) if transposed else (q, scale)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q.float() * scale in fp32, rounded once to `dtype`.

    Args:
        q: (..., K) in float8_e4m3fn or float8_e5m2, any strides.
        scale: as `quantize` returns it; its shape and dtype say which elements share a scale. Any value is allowed:
            NaN gives NaN, 0 gives 0 and a negative scale turns signs.
        dtype: fp32, bf16 or fp16.

    Returns:
        The shape of q, contiguous. No gradients.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: the shape of the scale fits no granularity.
    """
    checks.check_tensors(q=q, scale=scale)
    return _dequantize(q, scale, dtype)


def absmax(x: Tensor, granularity: str = "tensor") -> Tensor:
    """The largest |x| of every block, in fp32 and of the shape of the scales of `quantize`; NaN where there is one.

    Args:
        x: (..., K) in fp32, bf16 or fp16, any strides.
        granularity: as in `quantize`.

    Raises:
        TypeError: x has another dtype.
        ValueError: granularity has another name.
    """
    checks.check_tensors(x=x)
    return _absmax(x, granularity)


def cast(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, saturate: bool = True) -> Tensor:
    """To the nearest FP8 value, ties to even, without a scale.

    Bit-equal to `x.clamp(-FP8_MAX, FP8_MAX).to(dtype)`; without `saturate` to the casts of ml_dtypes: what is more than
    FP8_MAX after rounding becomes infinity in E5M2 and NaN in E4M3, which has no infinity (torch saturates E4M3 in
    some versions, and never E5M2). NaN has the code 0x7f and keeps its sign (ml_dtypes writes 0x7e in E5M2).

    Args:
        x: fp32, bf16 or fp16 of any shape and strides.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        saturate: whether what is too large, and infinity, becomes the largest finite value.

    Raises:
        TypeError: a dtype is not one of those above.
    """
    checks.check_tensors(x=x)
    return _cast(x, dtype, saturate)


def _check_x(x: Tensor) -> tuple[int, int]:
    """Rows and columns of x."""
    checks.check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., K), got ()")
    return math.prod(x.shape[:-1]), x.shape[-1]


def _check_quantize(
    x: Tensor,
    maxima: Tensor | None,
    dtype: torch.dtype,
    granularity: str,
    scale_dtype: torch.dtype,
    transposed: bool,
) -> Granularity:
    rows, k = _check_x(x)
    g = find_granularity(granularity)
    check_float8("dtype", dtype)
    if scale_dtype not in g.scale_dtypes:
        expected = " or ".join(str(d) for d in g.scale_dtypes)
        raise TypeError(
            f"scale_dtype must be {expected} with granularity {g.name!r}, got {scale_dtype}"
        )
    if transposed and x.dim() != 2:
        raise ValueError(f"x must be 2-D to be transposed, got {tuple(x.shape)}")
    if maxima is not None:
        if maxima.dtype != torch.float32:
            raise TypeError(f"maxima must be float32, got {maxima.dtype}")
        shape = g.scale_shape(rows, k)
        if maxima.shape != shape or maxima.device != x.device:
            raise ValueError(
                f"maxima must have shape {shape} on {x.device}, got {tuple(maxima.shape)} on {maxima.device}"
            )
    checks.refuse_grad("fp8_quantize", x, maxima)
    return g


def _quantize_impl(
    x: Tensor,
    maxima: Tensor | None,
    dtype: torch.dtype,
    granularity: str,
    scale_dtype: torch.dtype,
    transposed: bool,
    seed: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _check_quantize(x, maxima, dtype, granularity, scale_dtype, transposed)
    backend = backends.quantizer(x.device, x.numel())
    rows, maxima = rows_of(x, x.shape[-1]), contiguous(maxima)
    q, scale, q_t = backend.quantize(rows, dtype, g, scale_dtype, transposed, seed, maxima)
    return shaped(q, *x.shape), scale, q.new_empty(0) if q_t is None else q_t


def _quantize_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = _check_quantize(x, *args[:-1])
    _, dtype, _, scale_dtype, transposed, _ = args
    rows, k = _check_x(x)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(g.scale_shape(rows, k), dtype=scale_dtype),
        x.new_empty((k, rows) if transposed else (0,), dtype=dtype),
    )


def _check_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Granularity:
    check_float8("q", q.dtype)
    if q.dim() == 0:
        raise ValueError("q must have shape (..., K), got ()")
    checks.check_float("dtype", dtype)
    checks.refuse_grad("fp8_dequantize", q, scale)
    if scale.device != q.device:
        raise ValueError(f"scale must be on {q.device}, got {scale.device}")
    return infer_granularity(scale, math.prod(q.shape[:-1]), q.shape[-1])


def _dequantize_impl(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    g = _check_dequantize(q, scale, dtype)
    backend = backends.quantizer(q.device, q.numel())
    rows = contiguous(rows_of(q, q.shape[-1]))
    return shaped(backend.dequantize(rows, contiguous(scale), g, dtype), *q.shape)


def _dequantize_fake(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_dequantize(q, scale, dtype)
    return q.new_empty(q.shape, dtype=dtype)


def _absmax_impl(x: Tensor, granularity: str) -> Tensor:
    _check_x(x)
    checks.refuse_grad("fp8_absmax", x)
    g = find_granularity(granularity)
    return backends.quantizer(x.device, x.numel()).absmax(rows_of(x, x.shape[-1]), g)


def _absmax_fake(x: Tensor, granularity: str) -> Tensor:
    shape = find_granularity(granularity).scale_shape(*_check_x(x))
    return x.new_empty(shape, dtype=torch.float32)


def _check_cast(x: Tensor, dtype: torch.dtype) -> None:
    checks.check_float("x", x.dtype)
    check_float8("dtype", dtype)
    checks.refuse_grad("fp8_cast", x)


def _cast_impl(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    _check_cast(x, dtype)
    return backends.quantizer(x.device, x.numel()).cast(contiguous(x), dtype, saturate)


def _cast_fake(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    _check_cast(x, dtype)
    return x.new_empty(x.shape, dtype=dtype)


_absmax = library.op(
    "fp8_absmax", "(Tensor x, str granularity) -> Tensor", _absmax_impl, _absmax_fake
)
_quantize = library.op(
    "fp8_quantize",
    "(Tensor x, Tensor? maxima, ScalarType dtype, str granularity, ScalarType scale_dtype, bool transposed, "
    "int? seed) -> (Tensor, Tensor, Tensor)",
    _quantize_impl,
    _quantize_fake,
)
_dequantize = library.op(
    "fp8_dequantize",
    "(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    _dequantize_impl,
    _dequantize_fake,
)
_cast = library.op(
    "fp8_cast", "(Tensor x, ScalarType dtype, bool saturate) -> Tensor", _cast_impl, _cast_fake
)
