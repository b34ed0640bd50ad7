"""Scales, dequantize, linear and embedding in plain torch, on any device.

All arithmetic is fp32 with one rounding per operation, in the order that is written here; `linear` is computed in
float64.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import format_names, modes, packing
from lowbit.float8 import e8m0_values
from lowbit.formats import DQ_BLOCK, Format
from lowbit.reference.activations import int8_linear, quantize_int8
from lowbit.reference.lowrank import add_low_rank, low_rank_product
from lowbit.reference.sparse import add_outliers, outlier_product
from lowbit.reference.structured import structured_values
from lowbit.weights.quantized import QuantTensor


@functools.cache
@modes.outside()
def dynamic_values() -> tuple[float, ...]:
    """The values of `dynamic_map`."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        decade = (10.0 ** (i - 6)) * means
        values += decade.tolist() + (-decade).tolist()
    return tuple(sorted(values))


def dynamic_map(
    device: torch.device | str = "cpu",
) -> Tensor:  # (256,) fp32, ascending, in [-1, 1]
    """The signed 8-bit dynamic code of double quantization (Dettmers, arXiv 1511.04561 and 2110.02861).

    Seven decades 10^-6 .. 1; decade i holds 2^i means of a linear division of [0.1, 1], with both signs.
    """
    return torch.tensor(dynamic_values(), dtype=torch.float32, device=device)


def of_two_levels(
    codes: Tensor,  # (N, groups), any dtype
    second: Tensor,  # (N, super-blocks), or (1,) for all
    format: Format,
) -> Tensor:  # (N, groups) fp32
    """Scales, or zeros that are added, times their second level: fp32, rounded once."""
    groups = codes.shape[1]
    if format.scale2_group is not None and format.group is not None:
        second = second.repeat_interleave(format.scale2_group // format.group, 1)[:, :groups]
    return codes.to(torch.float32) * second.to(torch.float32)


def of_double_quantization(
    codes: Tensor,  # (N, groups) uint8, or (R, groups) of some rows
    factors: Tensor,  # (ceil(N * groups / 256),) fp32, over the flattened scales of all rows
    offset: Tensor,  # () fp32
    rows: Tensor | None = None,  # (R,)
    table: Tensor | None = None,  # `dynamic_map`, if it is made already
) -> Tensor:  # fp32, the shape of `codes`
    """Scales of "dq8": the dynamic code times its factor, rounded, plus the offset, rounded."""
    values = (dynamic_map(codes.device) if table is None else table)[codes.long()]
    if rows is None:
        factor = factors.repeat_interleave(DQ_BLOCK)[: codes.numel()].view_as(values)
    else:
        groups = torch.arange(codes.shape[1], dtype=torch.int64, device=codes.device)
        factor = factors[(rows.long()[:, None] * codes.shape[1] + groups) // DQ_BLOCK]
    return values * factor + offset


def scale_values(codes: Tensor, format: Format) -> Tensor:  # fp32, the shape of `codes`
    """What scales that are codes of a byte stand for, before a second level: integers, E4M3 or E8M0."""
    if format.scale == "int7":
        codes = codes >> 1
    if format.scale == "e8m0":
        return e8m0_values(codes)
    if format.scale == "e4m3":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    return codes.to(torch.float32)


def chosen_tables(
    scales: Tensor | None,  # (N, groups) int8, as stored
    format: Format,
) -> Tensor | None:  # (N, groups) int64, 0 or 1
    """The table of every group, of a pair; None in formats of another scope."""
    if format.table_scope != "pair" or scales is None:
        return None
    return (scales & 1).long()


def effective_scales(qt: QuantTensor) -> Tensor | None:  # (N, groups) fp32
    """The fp32 scale of every group, second level applied; None without scales."""
    if qt.format.scale is None:
        return None
    scales = qt.tensors["scales"]
    if qt.format.scale == "e8m0":
        return e8m0_values(scales)
    if qt.format.scale == "e4m3" or qt.format.integer_scales:
        return of_two_levels(scale_values(scales, qt.format), qt.tensors["scales2"], qt.format)
    if qt.format.scale == "dq8":
        offset = qt.tensors["scales2_offset"]
        return of_double_quantization(scales, qt.tensors["scales2"], offset)
    return scales.to(torch.float32)


def in_one_level(qt: QuantTensor) -> QuantTensor:
    """A weight of double quantization with the same scales in fp32, each for itself; others as they are."""
    f = qt.format
    if f.scale != "dq8":
        return qt
    scales = effective_scales(qt)
    assert scales is not None
    kept = {name: t for name, t in qt.tensors.items() if not name.startswith("scales")}
    new = dataclasses.replace(f, name=format_names.with_scale(f.name, "fp32"), scale="fp32")
    return QuantTensor(new, qt.shape, {**kept, "scales": scales})


def effective_zeros(
    qt: QuantTensor, rows: slice = slice(None)
) -> Tensor | None:  # (R, groups) fp32
    """The zero of every group of some rows, second level applied; None without zeros."""
    if qt.zeros is None:
        return None
    if qt.zeros2 is None:
        return qt.zeros[rows].to(torch.float32)
    return of_two_levels(qt.zeros[rows], qt.zeros2[rows], qt.format)


def group_index(format: Format, k: int, device: torch.device) -> Tensor:  # (K,) int64
    """The group of each weight in a row of k."""
    return torch.arange(k, dtype=torch.int64, device=device) // (format.group or max(1, k))


def per_weight(terms: Tensor, format: Format, k: int) -> Tensor:  # (N, groups) -> (N, K) or (N, 1)
    """The term of each weight's group; with one group a column, to be broadcast."""
    if format.group is None or terms.shape[1] == 1:
        return terms
    # Half the time of an index.
    return terms[:, :, None].expand(-1, -1, format.group).flatten(1)[:, :k]


def code_values(
    codes: Tensor,  # (N, K) uint8, or what `packing.unpack_codes` gives
    format: Format,
    table: Tensor | None,  # the fitted table
    chosen: Tensor | None = None,  # (N, groups), what `chosen_tables` gives, with a pair of tables
) -> Tensor:  # (N, K) fp32; of structured formats K in whole codes
    """The value of every code before zero and scale."""
    if format.structured:
        return structured_values(codes, format, table)
    index = codes.long()
    if table is None:
        return torch.tensor(format.values(), dtype=torch.float32, device=codes.device)[index]
    if format.table_scope == "tensor":
        return table[index]
    if format.table_scope == "pair":
        if chosen is None:
            raise ValueError(f"chosen must be given: format {format.name!r} has a pair of tables")
        return table.flatten()[per_weight(chosen, format, codes.shape[1]) * 2**format.bits + index]
    if format.table_scope == "row":
        return table.gather(1, index)
    rows = torch.arange(codes.shape[0], dtype=torch.int64, device=codes.device).unsqueeze(1)
    return table[rows, group_index(format, codes.shape[1], codes.device), index]


def dequantize(qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    return dequantize_rows(qt, slice(None), effective_scales(qt)).to(dtype)


def dequantize_rows(
    qt: QuantTensor,
    rows: slice,
    scales: Tensor | None,  # (N, groups) fp32, of all rows
) -> Tensor:  # (R, K) fp32
    """Some rows of the weight."""
    weight = apply_scales(
        values_of(qt, rows),
        qt.format,
        None if scales is None else scales[rows],
        effective_zeros(qt, rows),
    )
    if qt.format.rank:
        left, right = factors(qt)
        return add_low_rank(weight, left[rows], right)
    if qt.outlier_columns is None or qt.outlier_values is None:
        return weight
    return add_outliers(weight, qt.outlier_columns[rows], qt.outlier_values[rows])


def values_of(qt: QuantTensor, rows: slice = slice(None)) -> Tensor:  # (R, K) fp32
    """The value of every code of some rows, before zero and scale."""
    table, scales = qt.table, qt.scales
    if table is not None and qt.format.table_scope in ("row", "group"):
        table = table[rows]
    codes = packing.unpack_codes(qt.tensors["codes"][rows], qt.format, qt.shape[1])
    chosen = chosen_tables(None if scales is None else scales[rows], qt.format)
    return code_values(codes, qt.format, table, chosen)[:, : qt.shape[1]]


def factors(qt: QuantTensor) -> tuple[Tensor, Tensor]:  # (N, r) and (r, K) fp32
    """L and R of the low-rank term as dense matrices."""
    left, right = (dequantize(f) if isinstance(f, QuantTensor) else f.float() for f in qt.factors)
    return left, right


def apply_scales(
    values: Tensor,  # (N, K) fp32
    format: Format,
    scales: Tensor | None,  # (N, groups) fp32
    zeros: Tensor | None,  # (N, groups)
) -> Tensor:
    """scale * (value - zero), or scale * value + zero for zero "min"."""
    if scales is None:
        return values
    scale = per_weight(scales, format, values.shape[1])
    if zeros is None:
        return scale * values
    zero = per_weight(zeros.to(torch.float32), format, values.shape[1])
    return scale * values + zero if format.zero == "min" else scale * (values - zero)


def linear(
    x: Tensor,  # (..., K)
    qt: QuantTensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    round_table_to: torch.dtype | None = None,
) -> Tensor:  # (..., N), dtype of x
    """x W^T + bias in float64, rounded once to the dtype of x; by `int8_linear` if the format wants int8 activations.

    `round_table_to=torch.bfloat16` states what a kernel that multiplies in bf16 computes: the table entry, never
    the product with the scale, is rounded to bf16. Integers of up to 8 bits, fp4, fp8 and bf16 tables are unaffected.
    Outliers and low-rank terms multiply x as it is given, never as int8.
    """
    columns, outliers = qt.outlier_columns, qt.outlier_values
    if qt.format.activation is not None:
        q, x_scales = quantize_int8(x.reshape(-1, x.shape[-1]), qt.format.activation_group)
        zeros = qt.zeros if qt.format.zero == "int" else effective_zeros(qt)
        weight = (qt.unpack(), qt.format, effective_scales(qt), zeros, qt.table)
        y = int8_linear(q, x_scales, *weight, bias)
        if columns is not None and outliers is not None:
            y = y + outlier_product(x.reshape(-1, x.shape[-1]).double(), columns, outliers).float()
        if qt.format.rank:
            y = y + low_rank_product(x.reshape(-1, x.shape[-1]).double(), *factors(qt)).float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    values = values_of(qt)
    if round_table_to is not None:
        values = values.to(round_table_to).to(torch.float32)
    w = apply_scales(values, qt.format, effective_scales(qt), effective_zeros(qt))
    if columns is not None and outliers is not None:
        w = add_outliers(w, columns, outliers)
    y = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    if qt.format.rank:
        y = y + low_rank_product(x.double(), *factors(qt))
    return y.to(x.dtype)


def embedding(indices: Tensor, qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the dequantized weight, (*indices.shape, K)."""
    return dequantize(qt, dtype)[indices]
