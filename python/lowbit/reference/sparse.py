"""The sparse term of a weight in plain torch."""

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
