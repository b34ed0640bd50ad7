"""The backend of the "canonical" layout: plain torch, any device, no kernel of ours.

Each call decodes what it needs to fp32 and leaves the product to torch, so it is right everywhere
and slow: the first call on a device says so through the logger "lowbit".
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import packing, reference
from lowbit.backends import available
from lowbit.forking import alone_after_fork
from lowbit.formats import FORMATS, Format

ROW = "reference"  # what `explain` calls it
_logger = logging.getLogger("lowbit")


@alone_after_fork
def linear(
    x: Tensor,  # (M, K)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
) -> Tensor:  # (M, N), dtype of x
    """x W^T + bias with fp32 products and sums, rounded once to the dtype of x."""
    _log_once(x.device.type)
    if format.activation is not None:
        q, x_scales = reference.quantize_int8(x)
        y = int8_linear(
            q, x_scales, codes, scales, zeros, table, bias, format, n, k, torch.float32, None
        )
        return y.to(x.dtype)
    weight = dequantize(codes, scales, zeros, table, format, n, k, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_epilogue(
    x: Tensor,  # (M, K)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
    activation: str | None,
    gate: Tensor | None,  # (M, N)
    residual: Tensor | None,  # (M, N)
) -> Tensor:  # (M, N), dtype of x
    """`linear` and what follows it in fp32, rounded once to the dtype of x."""
    y = linear(x.float(), codes, scales, zeros, table, bias, format, n, k)
    return reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)


def linear_added(
    x: Tensor,  # (M, K)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
    added: Tensor,  # (M, N) fp32
    dtype: torch.dtype,
) -> Tensor:  # (M, N) in `dtype`
    """x W^T + bias + added, rounded once."""
    y = linear(x.float(), codes, scales, zeros, table, bias, format, n, k)
    return (y + added).to(dtype)


def outlier_product(
    x: Tensor,  # (M, K)
    columns: Tensor,  # (N, P) int32
    values: Tensor,  # (N, P)
) -> Tensor:  # (M, N) fp32
    """`reference.outlier_product` of x in fp32. ValueError for a column that x lacks, as the kernel of n16 has it; on a
    GPU, where looking at them would wait for it, torch's own assertion stops the device.
    """
    _log_outliers_once(x.device.type)
    wrong = columns[(columns < 0) | (columns >= x.shape[1])] if x.is_cpu else columns[:0]
    if wrong.numel():
        raise ValueError(f"outlier_columns must be in [0, {x.shape[1]}), got {int(wrong[0])}")
    return reference.outlier_product(x.float(), columns, values)


def outliers_row() -> str:
    """What `explain` calls `outlier_product`."""
    return "torch"


def linear_many(
    x: Tensor,  # (M, K)
    weights: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]],
    biases: list[Tensor | None],  # (N_i,)
    formats: list[Format],
    ns: list[int],
    k: int,
) -> list[Tensor]:  # (M, N_i), dtype of x
    """x W_i^T + bias_i, one after another."""
    each = zip(weights, biases, formats, ns, strict=True)
    return [linear(x, *w, bias, format, n, k) for w, bias, format, n in each]


@alone_after_fork
def int8_linear(
    q: Tensor,  # (M, K) int8
    x_scales: Tensor,  # (M,) or (M, groups) fp32
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    out_scale: float | None,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.int8_linear`, rounded once to `dtype`, or divided by out_scale for int8."""
    _log_once(q.device.type)
    unpacked = packing.unpack_codes(codes, format, k)
    scales = None if scales is None else scales.float()
    y = reference.int8_linear(q, x_scales, unpacked, format, scales, zeros, table, bias)
    return reference.requantize(y, out_scale) if out_scale is not None else y.to(dtype)


def int8_quantize(
    x: Tensor,  # (M, K)
    group: int | None,
    scale: Tensor | None,  # (M,)
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_int8`."""
    return reference.quantize_int8(x, group, scale)


@alone_after_fork
def binary_linear(
    bits: Tensor,  # (M, ceil(K / 8)) uint8
    x_scales: Tensor,  # (M,) fp32
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,  # (N,)
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:  # (M, N) in `dtype`
    """`reference.binary_linear`, rounded once to `dtype`."""
    _log_once(bits.device.type)
    signs, unpacked = (packing.unpack_codes(t, format, k) for t in (bits, codes))
    scales = None if scales is None else scales.float()
    return reference.binary_linear(signs, x_scales, unpacked, format, scales, bias).to(dtype)


def binary_quantize(
    x: Tensor,  # (M, K)
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_binary`, the codes in canonical packing."""
    codes, scales = reference.quantize_binary(x)
    return packing.pack_codes(codes, FORMATS["binary"]), scales


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    values = reference.code_values(packing.unpack_codes(codes, format, k), format, table)
    scales = None if scales is None else scales.float()
    return reference.apply_scales(values, format, scales, zeros).to(dtype)


def embedding(
    indices: Tensor,  # (M,) int64, each in [0, N)
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:  # (M, K)
    """Rows of the dequantized weight; only these rows are decoded."""
    _log_once(indices.device.type)
    if table is not None and format.table_scope != "tensor":
        table = table[indices]
    scales, zeros = (None if t is None else t[indices] for t in (scales, zeros))
    return dequantize(codes[indices], scales, zeros, table, format, indices.numel(), k, dtype)


def pack(codes: Tensor, format: Format) -> Tensor:
    """Canonical packing: (N, K) uint8 to (N, row bytes) uint8."""
    return packing.pack_codes(codes, format)


def unpack(packed: Tensor, format: Format, k: int) -> Tensor:
    """Inverse of `pack`."""
    return packing.unpack_codes(packed, format, k)


@functools.cache
def _log_outliers_once(device_type: str) -> None:
    _logger.info("plain torch multiplies the outliers of weights on %s", device_type)


@functools.cache
def _log_once(device_type: str) -> None:
    why = (
        "the weight is in canonical layout"
        if device_type == "cpu"
        else f"triton, which has the {device_type} kernels, is not installed"
        if device_type == "cuda" and not available.has_triton()
        else f"there is no {device_type} kernel for it"
    )
    _logger.warning("plain torch dequantizes the weight in every call on %s: %s", device_type, why)
