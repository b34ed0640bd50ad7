"""The only truth: scales, dequantize, linear and embedding in plain torch, on any device.

Every kernel is tested against this file. All arithmetic is fp32 with one rounding per operation, in the order that
is written here; `linear` is computed in float64.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import DQ_BLOCK, Format
from lowbit.tensor import QuantTensor


@functools.lru_cache(maxsize=1)
def dynamic_map() -> Tensor:  # (256,) fp32, ascending, in [-1, 1]
    """The signed 8-bit dynamic code of double quantization (Dettmers, arXiv 1511.04561 and 2110.02861).

    Seven decades 10^-6 .. 1; decade i holds 2^i means of a linear division of [0.1, 1], with both signs.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        decade = (10.0 ** (i - 6)) * means
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def e8m0_values(code: Tensor) -> Tensor:
    """2^(code - 127) in fp32, exact; 255 is NaN (OCP MX specification 1.0)."""
    value = torch.ldexp(torch.ones_like(code, dtype=torch.float64), code.to(torch.int32) - 127)
    return torch.where(code == 255, torch.nan, value).to(torch.float32)


def effective_scales(qt: QuantTensor) -> Tensor | None:  # (N, groups) fp32
    """The fp32 scale of every group, second level applied; None without scales."""
    if qt.format.scale is None:
        return None
    scales = qt.tensors["scales"]
    if qt.format.scale == "e8m0":
        return e8m0_values(scales)
    if qt.format.scale == "e4m3":
        return scales.to(torch.float32) * qt.tensors["scales2"]
    if qt.format.scale == "dq8":
        flat = dynamic_map().to(qt.device)[scales.flatten().long()]
        factor = qt.tensors["scales2"].repeat_interleave(DQ_BLOCK)[: flat.numel()]
        return (flat * factor + qt.tensors["scales2_offset"]).view_as(scales)
    return scales.to(torch.float32)


def group_index(format: Format, k: int, device: torch.device) -> Tensor:  # (K,) int64
    """The group of each weight in a row of k."""
    return torch.arange(k, device=device) // (format.group or max(1, k))


def code_values(
    codes: Tensor,  # (N, K) uint8
    format: Format,
    table: Tensor | None,  # the fitted table
) -> Tensor:  # (N, K) fp32
    """The value of every code before zero and scale."""
    index = codes.long()
    if table is None:
        return torch.tensor(format.values(), dtype=torch.float32, device=codes.device)[index]
    if format.table_scope == "tensor":
        return table[index]
    if format.table_scope == "row":
        return table.gather(1, index)
    rows = torch.arange(codes.shape[0], device=codes.device).unsqueeze(1)
    return table[rows, group_index(format, codes.shape[1], codes.device), index]


def dequantize(qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    values = code_values(qt.unpack(), qt.format, qt.table)
    return apply_scales(values, qt.format, effective_scales(qt), qt.zeros).to(dtype)


def apply_scales(
    values: Tensor,  # (N, K) fp32
    format: Format,
    scales: Tensor | None,  # (N, groups) fp32
    zeros: Tensor | None,  # (N, groups)
) -> Tensor:
    """scale * (value - zero), or scale * value + zero for zero "min"."""
    if scales is None:
        return values
    group = group_index(format, values.shape[1], values.device)
    scale = scales[:, group]
    if zeros is None:
        return scale * values
    zero = zeros.to(torch.float32)[:, group]
    return scale * values + zero if format.zero == "min" else scale * (values - zero)


def linear(
    x: Tensor,  # (..., K)
    qt: QuantTensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    round_table_to: torch.dtype | None = None,
) -> Tensor:  # (..., N), dtype of x
    """x W^T + bias in float64, rounded once to the dtype of x.

    `round_table_to=torch.bfloat16` states what a kernel that multiplies in bf16 computes: the table entry, never
    the product with the scale, is rounded to bf16. Integers of up to 8 bits, fp4, fp8 and bf16 tables are unaffected.
    """
    values = code_values(qt.unpack(), qt.format, qt.table)
    if round_table_to is not None:
        values = values.to(round_table_to).to(torch.float32)
    w = apply_scales(values, qt.format, effective_scales(qt), qt.zeros)
    y = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    return y.to(x.dtype)


def embedding(indices: Tensor, qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the dequantized weight, (*indices.shape, K)."""
    return dequantize(qt, dtype)[indices]
