"""One-dimensional k-means on the CPU (csrc/cpu/offline/kmeans.h). No checks."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C


def kmeans_rows(points: Tensor, counts: Tensor | None, entries: int) -> Tensor:
    """The best (R, entries) fp32 for points (R, C) fp32, ascending in each row, that count as `counts`, (R, C) fp64."""
    weights = None if counts is None else counts.numpy()
    return torch.from_numpy(
        _C.kmeans_rows(points.numpy(), weights, entries, torch.get_num_threads())
    )
