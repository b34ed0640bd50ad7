"""The kernels of quantized activations on the CPU. No maths and no checks, as in `weights.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import CODES, bound, of_bias, of_x, x_group
from lowbit.layouts import Operands
from lowbit.strides import address, address_of_rows


def _linear_quantized(
    x: Tensor,  # (M, K) int8 or (M, ceil(K / 8)) uint8, unit stride along K
    x_scales: Tensor,
    w: Operands,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_scale: float | None,
    kernel: int,
) -> Tensor:
    out = torch.empty((x.shape[0], w.n), dtype=dtype, device="cpu")
    bound(w).linear_quantized(
        **of_x(x),
        x_scales=address(x_scales),
        x_group=x_group(w) if x_scales.dim() == 2 else 0,
        **of_bias(bias),
        out=address(out),
        out_dtype=CODES[dtype],
        out_scale=1.0 if out_scale is None else out_scale,
        threads=torch.get_num_threads(),
        kernel=kernel,
    )
    return out


def int8_linear(
    q: Tensor,  # (M, K) int8, unit stride along K
    x_scales: Tensor,  # (M,), (M, groups) or (M, blocks) fp32 contiguous, as `reference.int8_linear`
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype,
    out_scale: float | None = None,
    kernel: int = -1,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.int8_linear`, rounded once to `dtype`, or divided by out_scale for int8."""
    return _linear_quantized(q, x_scales, w, bias, dtype, out_scale, kernel)


def binary_linear(
    bits: Tensor,  # (M, ceil(K / 8)) uint8, unit stride along K
    x_scales: Tensor,  # (M,) fp32 contiguous
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype,
    kernel: int = -1,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.binary_linear`, rounded once to `dtype`."""
    return _linear_quantized(bits, x_scales, w, bias, dtype, None, kernel)


def int8_quantize(
    x: Tensor,  # (M, K), unit stride along K
    group: int | None,
    scale: Tensor | None,  # (M,) fp32 contiguous
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_int8`."""
    m, k = x.shape
    shape = (m,) if group is None else (m, -(-k // group))
    scales = (
        torch.empty(shape, dtype=torch.float32, device="cpu") if scale is None else scale.clone()
    )
    q = torch.empty((m, k), dtype=torch.int8, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.quantize_int8_ptr(
        x=x_address,
        x_dtype=CODES[x.dtype],
        m=m,
        k=k,
        x_stride=x_stride,
        group=group or k,
        scales=address(scales),
        static_scales=scale is not None,
        q=address(q),
        threads=torch.get_num_threads(),
    )
    return q, scales


def binary_quantize(
    x: Tensor,  # (M, K), unit stride along K
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_binary`, the codes in canonical packing."""
    m, k = x.shape
    bits = torch.empty((m, -(-k // 8)), dtype=torch.uint8, device="cpu")
    scales = torch.empty(m, dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.quantize_binary_ptr(
        x=x_address,
        x_dtype=CODES[x.dtype],
        m=m,
        k=k,
        x_stride=x_stride,
        scales=address(scales),
        bits=address(bits),
        threads=torch.get_num_threads(),
    )
    return bits, scales
