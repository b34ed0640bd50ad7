"""`scaled_mm`, the product of two FP8 matrices, and its op torch.ops.lowbit.fp8_scaled_mm.

What it computes is stated in `reference.scaled_mm`; kernels sum in fp32 and scale the sums of groups.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit import checks, layouts
from lowbit.fp8 import granularity as granularities
from lowbit.fp8 import matmul_cpu, matmul_cuda, matmul_triton, reference
from lowbit.fp8.dtypes import FLOAT8, check_float8
from lowbit.fp8.granularity import Granularity
from lowbit.fp8.quantization import quantize

_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define(
    "fp8_scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
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
        a: (M, K) in float8_e4m3fn or float8_e5m2, any strides; rows of unit stride are read where they lie.
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
    if requantize is None:
        return _scaled_mm(a, b, scale_a, scale_b, bias, out_dtype or torch.bfloat16)
    if requantize not in _REQUANTIZED:
        raise ValueError(f"requantize must be None or one of {_REQUANTIZED}, got {requantize!r}")
    dtype = out_dtype or torch.float8_e4m3fn
    if dtype not in FLOAT8:
        raise TypeError(f"out_dtype must be {list(FLOAT8)} with requantize, got {dtype}")
    y = _scaled_mm(a, b, scale_a, scale_b, bias, torch.float32)
    q, scale = quantize(y, dtype, requantize)
    return q, scale


def _check(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Granularity, Granularity]:
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
    checks.refuse_grad("fp8_scaled_mm", scale_a, scale_b, bias)
    return (
        granularities.infer(scale_a, a.shape[0], a.shape[1], "scale_a"),
        granularities.infer(scale_b, b.shape[0], b.shape[1], "scale_b"),
    )


def _backend(device: torch.device, a: Granularity, b: Granularity) -> ModuleType:
    if device.type == "cpu":
        return matmul_cpu
    if matmul_cuda.runs(device, a, b):
        return matmul_cuda
    return matmul_triton if layouts.has_triton() else reference


def _impl(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    granularity_a, granularity_b = _check(a, b, *args)
    scale_a, scale_b, bias, out_dtype = args
    backend = _backend(a.device, granularity_a, granularity_b)
    if backend is reference:
        return reference.scaled_mm(a, b, scale_a, scale_b, bias).to(out_dtype)
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    bias = bias if bias is None else bias.contiguous()
    scales = scale_a.contiguous(), scale_b.contiguous()
    return backend.scaled_mm(a, b, *scales, granularity_a, granularity_b, bias, out_dtype)


def _fake(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    _check(a, b, *args)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=args[-1])


for _key in ("CPU", "CUDA"):
    _library.impl("fp8_scaled_mm", _impl, _key)
torch.library.register_fake("lowbit::fp8_scaled_mm", _fake, lib=_library)
_scaled_mm = torch.ops.lowbit.fp8_scaled_mm.default
