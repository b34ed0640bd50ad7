"""Rows and columns of a QuantTensor, in canonical layout: dequantized they are those of the whole weight, bit for bit.

Rows need nothing but a choice among what is stored by row. A cut along K through a group makes groups smaller: those of
a piece are the largest that every cut leaves whole, and their scales are repeated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import format_names, packing
from lowbit.formats import DQ_BLOCK, Format
from lowbit.weights.quantized import QuantTensor

# A cut through a group leaves none below this, the smallest of a built-in format: of smaller ones scales take more
# than they are worth.
SMALLEST_GROUP = 16


def is_by_row(format: Format, name: str) -> bool:
    """Whether the canonical tensor `name` of a format holds a row for each row of the weight."""
    if name == "table":
        return format.table_scope in ("row", "group")
    if name in ("scales2", "scales2_offset"):
        return format.integer_scales
    if name.startswith("lowrank_l_") and format.factor_format is not None:
        return is_by_row(format.factor_format, name.removeprefix("lowrank_l_"))
    return not name.startswith("lowrank_r")


def is_by_column(format: Format, name: str, k: int) -> bool:
    """Whether the second dimension of the canonical tensor `name` of a weight of k columns goes along K."""
    if name.startswith("lowrank_r_") and format.factor_format is not None:
        return is_by_column(format.factor_format, name.removeprefix("lowrank_r_"), k)
    if name in ("codes", "lowrank_r"):
        return True
    if name in ("scales", "zeros") or (name == "table" and format.table_scope == "group"):
        return not _is_row(format.group, k)
    return (
        name in ("scales2", "zeros2")
        and format.integer_scales
        and not _is_row(format.scale2_group, k)
    )


def _is_row(group: int | None, k: int) -> bool:
    """Whether a row of k weights is one group."""
    return group is None or group >= k


def cuts_second_level(format: Format, k: int, rows: int) -> bool:
    """Whether a cut at every multiple of so many rows goes through what scales of "dq8" share."""
    return format.scale == "dq8" and rows * format.num_groups(k) % DQ_BLOCK != 0


def rows_of(weight: QuantTensor, rows: slice | Tensor) -> QuantTensor:
    """Some rows of a weight.

    Args:
        weight: (N, K).
        rows: a slice without a step, or (R,) int64, in any order.

    Returns:
        (R, K) in the same format; tensors that are those of all rows are not copied.

    Raises:
        ValueError: the format is of double quantization, and the rows do not begin and end where its blocks do.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "nf4")
        >>> torch.equal(rows_of(qt, slice(8, 24)).dequantize(), qt.dequantize()[8:24])
        True
    """
    f, (n, k) = weight.format, weight.shape
    tensors = {
        name: t[rows].contiguous() if is_by_row(f, name) else t
        for name, t in weight.tensors.items()
    }
    if f.scale == "dq8":
        start, stop, step = rows.indices(n) if isinstance(rows, slice) else (0, n, 0)
        first, last = start * f.num_groups(k), stop * f.num_groups(k)
        if step != 1 or first % DQ_BLOCK or (last % DQ_BLOCK and stop != n):
            raise ValueError(
                f"rows of a weight in format {f.name!r} must begin and end at multiples of {DQ_BLOCK} scales, "
                f"got {rows}: use `reference.in_one_level` first"
            )
        tensors["scales2"] = tensors["scales2"][first // DQ_BLOCK : -(-last // DQ_BLOCK)]
    return QuantTensor(f, (len(tensors["codes"]), k), tensors)


def stacked(weights: Sequence[QuantTensor]) -> QuantTensor | None:
    """Weights one below the other; None if no weight of their format is that.

    They must be of one format and one K, and what of it is not stored by row (a table of the whole weight, R of a
    low-rank term) must be the same in all. Factors of double quantization go over all rows: there is none.

    Args:
        weights: at least one, (N_i, K) each.

    Returns:
        (N_1 + N_2 + ..., K); the weight itself if it is alone.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "nf4")
        >>> stacked([qt, qt]).shape
        (128, 128)
    """
    first, *others = weights
    if not others:
        return first
    f, k = first.format, first.shape[1]
    if f.scale == "dq8" or any(w.format != f or w.shape[1] != k for w in others):
        return None
    made = {}
    for name, t in first.tensors.items():
        if is_by_row(f, name):
            made[name] = torch.cat([w.tensors[name] for w in weights])
        elif all(torch.equal(t, w.tensors[name]) for w in others):
            made[name] = t
        else:
            return None
    return QuantTensor(f, (sum(w.shape[0] for w in weights), k), made)


def column_format(format: Format, k: int, unit: int) -> Format:
    """The format of pieces that a weight of k columns is cut into at multiples of `unit`; itself if no group is cut, or
    a row is one.

    Outliers and a low-rank term are not looked at.

    Raises:
        ValueError: no format has the same values in such pieces, or its groups would be below `SMALLEST_GROUP`.
    """
    f = format
    if f.codec == "trellis":
        raise ValueError(
            "weights of a trellis are functions of the codes that follow them in the row"
        )
    if unit % f.dim:
        raise ValueError(f"a code stands for {f.dim} weights, and {unit} is no multiple of them")
    if f.scale == "dq8":
        raise ValueError("scales of double quantization share factors over all rows")
    if f.activation is not None and (f.activation_group is None or unit % f.activation_group):
        size = "whole rows" if f.activation_group is None else f"{f.activation_group} values"
        raise ValueError(f"int8 activations have a scale for {size}, which a cut would change")
    group, second = (
        size if size is None or _is_row(size, k) else math.gcd(size, unit)
        for size in (f.group, f.scale2_group)
    )
    if (group, second) == (f.group, f.scale2_group):
        return f
    if group != f.group and group is not None and group < SMALLEST_GROUP:
        raise ValueError(
            f"groups of {f.group} would become groups of {group}, {SMALLEST_GROUP} are the least"
        )
    name = f.name if group == f.group else format_names.with_group(f.name, group)
    return dataclasses.replace(f, name=name, group=group, scale2_group=second)


def columns_of(weight: QuantTensor, start: int, stop: int, unit: int | None = None) -> QuantTensor:
    """Columns start .. stop - 1 of a weight.

    Args:
        weight: (N, K).
        start, stop: 0 <= start < stop <= K.
        unit: all cuts that are made of this weight are at multiples of it, as `start` is: pieces then have one format.
            None: there is no other one.

    Returns:
        (N, stop - start). A format whose groups the cuts go through gets smaller ones, with scales repeated
        (`column_format`). Outliers of a piece are as many in every row as the row of most has.

    Raises:
        ValueError: as `column_format`; the range is none of the weight, the start is no multiple of `unit`, or the
            rank of a low-rank term is not below the number of columns.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "int4_g64")
        >>> half = columns_of(qt, 96, 128)
        >>> half.format.group, torch.equal(half.dequantize(), qt.dequantize()[:, 96:])
        (32, True)
    """
    f, (n, k) = weight.format, weight.shape
    if not 0 <= start < stop <= k:
        raise ValueError(f"columns must be a range in [0, {k}), got {start} to {stop}")
    unit = start if unit is None else unit
    if start and (unit < 1 or start % unit):
        raise ValueError(f"start must be a multiple of unit, got {start} and {unit}")
    whole = (start, stop) == (0, k) and unit % k == 0
    if whole:
        return weight
    width = stop - start
    if f.rank:
        return _of_sum(weight, start, stop, unit)
    if f.outliers:
        return _with_outliers(weight, start, stop, unit)
    new = column_format(f, k, unit)
    codes = weight.unpack()[:, start // f.dim : -(-stop // f.dim)]
    made = {"codes": packing.pack_codes(codes.contiguous(), new)}
    sizes = {
        "scales": (f.group, new.group), "zeros": (f.group, new.group), "table": (f.group, new.group),
        "scales2": (f.scale2_group, new.scale2_group), "zeros2": (f.scale2_group, new.scale2_group),
    }  # fmt: skip
    for name, t in weight.tensors.items():
        if name == "codes":
            continue
        if not is_by_column(f, name, k):
            made[name] = t
            continue
        old, size = sizes[name]
        assert old is not None
        assert size is not None
        first = torch.arange(start, stop, size, dtype=torch.int64, device=t.device)
        made[name] = t[:, first // old].contiguous()
    return QuantTensor(new, (n, width), made)


def _of_sum(weight: QuantTensor, start: int, stop: int, unit: int) -> QuantTensor:
    """Columns of a weight with a low-rank term: those of the matrix and of R; L is that of all."""
    f, (n, _k) = weight.format, weight.shape
    width = stop - start
    if f.rank >= min(n, width):
        raise ValueError(
            f"the rank {f.rank} must be below {min(n, width)} in a piece {n} x {width}"
        )
    matrix, (left, right) = columns_of(weight.matrix, start, stop, unit), weight.factors
    tensors, factor = dict(matrix.tensors), f.factor
    if isinstance(left, QuantTensor) and isinstance(right, QuantTensor):
        right = columns_of(right, start, stop, unit)
        left = _regrouped(left, right.format)
        factor = right.format.spec
        for name, part in (("lowrank_l", left), ("lowrank_r", right)):
            tensors |= {f"{name}_{key}": t for key, t in part.tensors.items()}
    else:
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        tensors |= {"lowrank_l": left, "lowrank_r": right[:, start:stop].contiguous()}
    m = matrix.format
    new = f if m is f.matrix and factor == f.factor else m.with_rank(f.rank, factor)
    return QuantTensor(new, (n, width), tensors)


def _regrouped(weight: QuantTensor, format: Format) -> QuantTensor:
    """A weight with the smaller groups of a format, which divide its own."""
    if weight.format == format:
        return weight
    f, (n, k) = weight.format, weight.shape
    assert f.group is not None
    assert format.group is not None
    first = torch.arange(0, k, format.group, dtype=torch.int64, device=weight.device)
    tensors = {
        name: t[:, first // f.group].contiguous() if name in ("scales", "zeros") else t
        for name, t in weight.tensors.items()
    }
    return QuantTensor(format, (n, k), tensors)


def _with_outliers(weight: QuantTensor, start: int, stop: int, unit: int) -> QuantTensor:
    """Columns of a weight with outliers. Rows with fewer than others get some of value -0, which change nothing."""
    f, (n, k) = weight.format, weight.shape
    columns, values = weight.tensors["outlier_columns"].long(), weight.tensors["outlier_values"]
    matrix, width = columns_of(weight.matrix, start, stop, unit), stop - start
    size = unit or stop
    counts = torch.zeros((n, -(-k // size)), dtype=torch.int64, device=columns.device)
    counts.scatter_add_(1, columns // size, torch.ones_like(columns))
    most = int(counts.max()) if n else 1
    kept = min(most, width)
    inside = (columns >= start) & (columns < stop)
    # Candidates: the outliers of this piece, and its first columns. Those come last, and not twice.
    spare = torch.arange(kept, dtype=torch.int64, device=columns.device).expand(n, kept)
    local = columns - start
    used = ((spare[:, :, None] == local[:, None, :]) & inside[:, None, :]).any(-1)
    keys = torch.cat((local + 4 * k * ~inside, spare + k + k * used), 1)
    order = keys.argsort(1)[:, :kept]
    places = torch.cat((local, spare), 1).gather(1, order)
    filled = torch.cat((values, torch.full_like(values[:, :1], -0.0).expand(n, kept)), 1)
    places, ascending = places.sort(1)
    new = matrix.format
    if new is f.matrix and most == f.outliers:
        new = f
    else:
        name = format_names.with_outliers(new.name, most, f.outlier_dtype)
        new = dataclasses.replace(new, name=name, outliers=most, outlier_dtype=f.outlier_dtype)
    tensors = {
        **matrix.tensors,
        "outlier_columns": places.to(torch.int32),
        "outlier_values": filled.gather(1, order).gather(1, ascending),
    }
    return QuantTensor(new, (n, width), tensors)
