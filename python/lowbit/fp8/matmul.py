"""`scaled_mm`, the product of two FP8 matrices, and its ops torch.ops.lowbit.fp8_scaled_mm*.

What it computes is stated in `reference.scaled_mm`; kernels sum in fp32 and scale the sums of groups.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import available
from lowbit.fp8 import granularity as granularities
from lowbit.fp8 import matmul_cpu, matmul_cuda, matmul_triton, reference
from lowbit.fp8.dtypes import FLOAT8, check_float8
from lowbit.fp8.granularity import Granularity
from lowbit.fp8.quantization import quantize
from lowbit.ops import checks, transforms
from lowbit.strides import contiguous, rows_of

_logger = logging.getLogger("lowbit")
_library = torch.library.Library("lowbit", "FRAGMENT")
_OPERANDS = "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias"
_SCHEMAS = {
    "fp8_scaled_mm": f"({_OPERANDS}, ScalarType out_dtype) -> Tensor",
    "fp8_scaled_mm_quantized": (
        f"({_OPERANDS}, ScalarType out_dtype, str granularity) -> (Tensor, Tensor)"
    ),
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
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


def check(operands: Sequence[Any], out_dtype: torch.dtype) -> tuple[Granularity, Granularity]:
    """Checks a, b, their scales and the bias, and returns the granularities."""
    a, b, scale_a, scale_b, bias = operands
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
    return (
        granularities.infer(scale_a, a.shape[0], a.shape[1], "scale_a"),
        granularities.infer(scale_b, b.shape[0], b.shape[1], "scale_b"),
    )


def backend_of(device: torch.device, a: Granularity, b: Granularity, m: int) -> ModuleType:
    """What computes a product of m rows of a with these scales on a device."""
    if device.type == "cpu":
        return matmul_cpu
    obstacle = matmul_cuda.obstacle(device, a, b, m)
    if obstacle is None:
        return matmul_cuda
    if available.has_triton():
        _log_triton(obstacle)
        return matmul_triton
    reference.log_use(device.type)
    return reference


@functools.cache
def _log_triton(why: str) -> None:
    _logger.info("the Triton kernel computes FP8 products, not the CUDA kernel: %s", why)


def fuses_quantize(backend: ModuleType, granularity: str | None) -> bool:
    """Whether the kernel of the product quantizes y as well."""
    return backend is matmul_triton and granularity == "1x16"


def ready(tensors: Sequence[Any]) -> list[Any]:
    """a and b with unit stride along K, the others contiguous."""
    a, b, *others = tensors
    return [*(rows_of(t, t.shape[1]) for t in (a, b)), *map(contiguous, others)]


def _impl(*args: Any) -> Tensor:
    *tensors, out_dtype = args
    both = check(tensors, out_dtype)
    backend = backend_of(tensors[0].device, *both, len(tensors[0]))
    if backend is reference:
        return reference.scaled_mm(*tensors).to(out_dtype)
    *operands, bias = ready(tensors)
    y: Tensor = backend.scaled_mm(*operands, *both, bias, out_dtype)
    return y


def _quantized_impl(*args: Any) -> tuple[Tensor, ...]:
    *tensors, out_dtype, granularity = args
    both = check(tensors, torch.float32)
    backend = backend_of(tensors[0].device, *both, len(tensors[0]))
    if fuses_quantize(backend, granularity):
        *operands, bias = ready(tensors)
        q, scale = backend.scaled_mm_quantized(*operands, *both, bias, out_dtype)
        return q, scale
    return quantize(_impl(*tensors, torch.float32), out_dtype, granularity)


def _fake(*args: Any) -> Tensor:
    *tensors, out_dtype = args
    check(tensors, out_dtype)
    a, b = tensors[:2]
    y: Tensor = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    return y


def _quantized_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, out_dtype, granularity = args
    check(tensors, torch.float32)
    a, b = tensors[:2]
    m, n = a.shape[0], b.shape[0]
    shape = granularities.find(granularity).scale_shape(m, n)
    return a.new_empty((m, n), dtype=out_dtype), a.new_empty(shape, dtype=torch.float32)


for _name, _kernel, _meta in (
    ("fp8_scaled_mm", _impl, _fake),
    ("fp8_scaled_mm_quantized", _quantized_impl, _quantized_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"lowbit::{_name}", _meta, lib=_library)
    transforms.register(
        _library, _name, transforms.opaque_call(getattr(torch.ops.lowbit, _name).default)
    )
_scaled_mm = torch.ops.lowbit.fp8_scaled_mm.default
_scaled_mm_quantized = torch.ops.lowbit.fp8_scaled_mm_quantized.default
