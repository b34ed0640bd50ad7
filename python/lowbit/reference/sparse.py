"""Sparse terms of a weight, and pruned weights, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_outliers(
    weight: Tensor,  # (N, K) fp32
    columns: Tensor,  # (N, P) int32
    values: Tensor,  # (N, P)
) -> Tensor:  # (N, K) fp32
    """weight + S, where S[n, columns[n, i]] = values[n, i] and 0 elsewhere."""
    return weight.scatter_add(1, columns.long(), values.to(weight.dtype))


def outlier_product(
    x: Tensor,  # (M, K)
    columns: Tensor,  # (N, P) int32
    values: Tensor,  # (N, P)
) -> Tensor:  # (M, N), dtype of x
    """x S^T in the dtype of x."""
    n, count = columns.shape  # bags by their offsets, as P = 0 makes them empty
    if not x.shape[0]:  # which embedding_bag does not take
        return x.new_empty(0, n)
    offsets = torch.arange(n, dtype=torch.int64, device=columns.device) * count
    weights = values.to(x.dtype).flatten()
    return F.embedding_bag(
        columns.flatten(), x.t().contiguous(), offsets, mode="sum", per_sample_weights=weights
    ).t()


def pruned_weight(
    entries: Tensor,  # (steps, 2, R) uint8
    starts: Tensor,  # (ceil(N / R) + 1,) int64
    table: Tensor,  # (E,)
    n: int,
    k: int,
) -> Tensor:  # (N, K), dtype of the table
    """The matrix of the operands of a pruned weight (`layouts.PrunedOperands`), R of its rows side by side."""
    rows, columns, codes = pruned_places(entries, starts, n, k)
    weight = table.new_zeros((n, k))
    return weight.index_put((rows, columns), table[codes])


def pruned_places(
    entries: Tensor, starts: Tensor, n: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:  # (P,) int64 each
    """Rows, columns and codes of the entries of operands whose code is not 0."""
    steps, _, size = entries.shape
    distances, codes = entries.unbind(1)
    ends = (distances.long() + 1).cumsum(0)
    block = torch.bucketize(
        torch.arange(steps, dtype=torch.int64, device=starts.device), starts[1:], right=True
    )
    # What the blocks before add up to.
    before = F.pad(ends, (0, 0, 1, 0))[starts[block]]
    columns = ends - before - 1
    rows = block[:, None] * size + torch.arange(size, dtype=torch.int64, device=starts.device)
    real = (codes != 0) & (columns < k) & (rows < n)
    return rows[real], columns[real], codes[real].long()


def pruned_product(
    x: Tensor,  # (M, K)
    entries: Tensor,
    starts: Tensor,
    table: Tensor,
    n: int,
) -> Tensor:  # (M, N), dtype of x
    """x W^T in the dtype of x, for the `pruned_weight` W."""
    return x @ pruned_weight(entries, starts, table, n, x.shape[1]).to(x.dtype).t()
