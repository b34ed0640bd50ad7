"""The backend of the "m16" layout: launches the CUDA kernels of `lowbit._cuda`. No maths and no checks.

bf16 and fp16 x multiply with the packed weight up to the M where a copy decoded to their dtype and torch's product are
faster; fp32 x, which has no tensor cores, always takes a decoded copy in fp32. Products with int8 activations and with
signs run in plain torch. Infinity in x gives NaN where zeros are floats: their sums are kept apart.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.backends import reference as plain
from lowbit.backends import triton
from lowbit.backends.packed import Derived
from lowbit.formats import Format
from lowbit.layouts import LAYOUTS, M16
from lowbit.layouts.m16 import TILE_K
from lowbit.strides import address, address_of_rows

if TYPE_CHECKING:
    from lowbit._cuda import Weight

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
_logger = logging.getLogger("lowbit")


@functools.lru_cache(maxsize=4096)
def weight(
    format: Format, n: int, k: int, scales: torch.dtype | None, zeros: torch.dtype | None
) -> Weight:
    """What the extension knows of a weight besides its tensors."""
    from lowbit import _cuda

    return _cuda.Weight(
        n,
        k,
        format.group or max(1, k),
        format.bits,
        format.zero,
        None if scales is None else _TYPES[scales],
        None if zeros is None else _TYPES[zeros],
    )


@functools.lru_cache(maxsize=4096)
def _choose(w: Weight, m: int, device: torch.device) -> tuple[str, int, int, int, int, int, bool]:
    major, minor = torch.cuda.get_device_capability(device)
    return w.choose(m, 10 * major + minor, triton.num_sms(device))


def multiplies(x: torch.dtype, format: Format) -> bool:
    """Whether tensor cores multiply x with the format's table."""
    return x != torch.float32 and triton.compute_dtype(x, format) == x


def describe(format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device) -> str:
    """The name of what `linear` runs for a format without int8 activations."""
    family, tiles, splits, *_ = _choose(_weight_of(format, n, k), max(1, m), device)
    if not multiplies(x, format):
        family = "decode"
    return {
        "mma": f"cuda_mma_{8 * tiles}_split{splits}",
        "wgmma": f"cuda_wgmma_{8 * tiles}_split{splits}",
        "decode": "cuda_dequantize, torch",
    }[family]


def _weight_of(format: Format, n: int, k: int) -> Weight:
    specs = LAYOUTS[M16].specs(format, n, k)
    scales, zeros = (specs[t][1] if t in specs else None for t in ("scales", "zeros"))
    return weight(format, n, k, scales, zeros)


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
    dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N) in `dtype`, by default that of x
    """x W^T + bias with fp32 sums, rounded once."""
    m, dtype = x.shape[0], dtype or x.dtype
    if format.activation is not None:
        operands = (codes, scales, zeros, table)
        return _derived.activation_linear(x, *operands, bias, format, n, k).to(dtype)
    w = weight(format, n, k, *(None if t is None else t.dtype for t in (scales, zeros)))
    if m == 0 or n == 0 or k == 0:
        zeros_out = x.new_zeros((m, n), dtype=dtype)
        return zeros_out if bias is None else zeros_out + bias.to(dtype)
    config = _choose(w, m, x.device)
    if config[0] == "decode" or not multiplies(x.dtype, format):
        _log_decode(x.dtype, config[0] == "decode")
        compute = x.dtype if multiplies(x.dtype, format) else torch.float32
        decoded = dequantize(codes, scales, zeros, table, format, n, k, compute)
        bias = None if bias is None else bias.to(compute)
        return F.linear(x.to(compute), decoded, bias).to(dtype)
    if k % TILE_K:
        x = F.pad(x, (0, -k % TILE_K))
    elif x.stride(1) != 1 or (m > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    splits = config[2]
    parts = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None
    sums = x.new_empty((w.num_groups, m), dtype=torch.float32) if w.float_zero else None
    device = x.device.index or 0
    with torch.cuda.device(x.device):
        w.linear(
            device,
            torch.cuda.current_stream(x.device).cuda_stream,
            config,
            _TYPES[x.dtype],
            m,
            *address_of_rows(x),
            address(codes),
            address(scales),
            address(zeros),
            address(table),
            address(sums),
            address(bias),
            "fp32" if bias is None else _TYPES[bias.dtype],
            address(out),
            _TYPES[dtype],
            address(parts),
        )
    return out


@functools.cache
def _log_decode(dtype: torch.dtype, large: bool) -> None:
    why = "M is large" if large else f"tensor cores do not multiply {dtype} with this table"
    _logger.info("the weight is decoded and torch multiplies: %s", why)


def _rows(
    indices: Tensor | None,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    table: Tensor | None,
    format: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = n if indices is None else indices.numel()
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    w = weight(format, n, k, *(None if t is None else t.dtype for t in (scales, zeros)))
    with torch.cuda.device(codes.device):
        w.dequantize(
            codes.device.index or 0,
            torch.cuda.current_stream(codes.device).cuda_stream,
            rows,
            address(indices),
            address(codes),
            address(scales),
            address(zeros),
            address(table),
            address(out),
            _TYPES[dtype],
        )
    return out


_derived = Derived(M16, linear, _rows)
linear_epilogue = _derived.linear_epilogue
linear_added = _derived.linear_added
linear_many = _derived.linear_many
dequantize = _derived.dequantize
embedding = _derived.embedding
int8_linear = _derived.int8_linear
binary_linear = _derived.binary_linear
outlier_product = plain.outlier_product
outliers_row = plain.outliers_row
