"""Outliers: the weights of a row that a sparse term keeps beside the codes (`Format.outliers`).

The dense-and-sparse decomposition of SqueezeLLM (Kim et al., arXiv 2306.07629): W = Q + S with a sparse S. Q is fitted
without the outliers, and S holds what Q lacks there.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format
from lowbit.methods import grid
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor


def find(
    weight: Tensor,  # (N, K)
    format: Format,
    importance: Tensor | None,  # (N, K), as of k-means
) -> Tensor:  # (N, P) int32, ascending in each row
    """The columns of the weights that would cost most: the largest importance * w^2 of each row.

    As in the paper: outliers by magnitude, and by the importance of sensitive weights. Interpretation: the same
    number in each row instead of a threshold for the matrix, one score for both kinds, and where the format has a zero
    point w is measured from the mean of its group, which need not be 0.
    """
    n, k = weight.shape
    count = format.num_outliers(k)
    columns = torch.empty((n, count), dtype=torch.int32, device=weight.device)
    for rows, w in grid.slices(weight):
        if format.zero is not None:
            w = w - _group_means(w, format)
        # fp64: squares of fp32 numbers underflow and overflow.
        score = w.double().square()
        if importance is not None:
            score = score * importance[rows].double()
        columns[rows] = score.topk(count, dim=1).indices.sort(dim=1).values.to(torch.int32)
    return columns


def fill(
    weight: Tensor,  # (N, K)
    format: Format,
    columns: Tensor,  # (N, P) int32
) -> Tensor:  # (N, K) fp32
    """The weight with the mean of the others of its group in the place of each outlier, 0 if there are no others.

    No scale, zero or range of a group depends on its outliers then. What GPTQ makes up for in later columns includes
    the error of that mean, which S takes away.
    """
    filled = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows, w in grid.slices(weight):
        index = columns[rows].long()
        others = torch.ones_like(w).scatter_(1, index, 0.0)
        count = _group_sums(others, format)
        means = torch.where(count > 0, _group_sums(w * others, format) / count, 0.0)
        group = reference.group_index(format, w.shape[1], w.device)
        filled[rows] = torch.where(others > 0, w, means[:, group])
    return filled


def without(importance: Tensor, columns: Tensor) -> Tensor:
    """The importance of weights with that of the outliers 0."""
    return importance.scatter(1, columns.long(), 0.0)


def add(
    qt: QuantTensor,
    format: Format,
    weight: Tensor,  # (N, K)
    columns: Tensor,  # (N, P) int32
) -> QuantTensor:
    """The quantized weight in `format`, with w - w^ in fp32, rounded to its dtype, for each outlier.

    A method that makes a format of its own ("nuuq") keeps it, with the outliers of `format`.

    Raises:
        ValueError: such a rest does not fit the dtype.
    """
    dtype = SCALE_DTYPES[format.outlier_dtype]
    values = torch.empty(columns.shape, dtype=dtype, device=weight.device)
    scales, lost = reference.effective_scales(qt), 0
    for rows, w in grid.slices(weight):
        index = columns[rows].long()
        rest = (w - reference.dequantize_rows(qt, rows, scales)).gather(1, index)
        stored = rest.to(dtype)
        bad = ~torch.isfinite(stored)
        if bool(bad.any()):
            n, i = (int(v) for v in bad.nonzero()[0])
            raise ValueError(
                f"weight: the outlier in row {rows.start + n}, column {int(index[n, i])} needs the "
                f"value {float(rest[n, i]):g}, which does not fit {format.outlier_dtype}: use fp32 outliers"
            )
        values[rows] = stored
        # Half a code of the weight itself.
        error = (stored.to(torch.float32) - rest).abs()
        lost += int((error > w.gather(1, index).abs() / 2 ** (format.bits / format.dim)).sum())
    if lost:
        warnings.warn(
            f"weight: {lost} of {values.numel()} outliers ({lost / values.numel():.2%}) are so small that "
            f"{format.outlier_dtype} loses them in format {format.name!r}: use fp32 outliers, or scale the weight",
            stacklevel=4,
        )
    sparse = {"outlier_columns": columns, "outlier_values": values}
    if qt.format != format.matrix:
        format = dataclasses.replace(
            qt.format,
            name=f"{qt.format.name}_o{format.outliers}",
            outliers=format.outliers,
            outlier_dtype=format.outlier_dtype,
        )
    return QuantTensor(format, qt.shape, {**qt.tensors, **sparse})


def _group_sums(values: Tensor, format: Format) -> Tensor:  # (R, K) -> (R, groups) fp32
    return torch.cat([part.sum(-1) for part in grid.group_parts(values, format)], 1)


def _group_means(w: Tensor, format: Format) -> Tensor:  # (R, K) fp32
    means = torch.cat([part.mean(-1) for part in grid.group_parts(w, format)], 1)
    return means[:, reference.group_index(format, w.shape[1], w.device)]
