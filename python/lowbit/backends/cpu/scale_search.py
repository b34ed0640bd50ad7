"""The search of scales on the CPU (csrc/cpu/offline/scale_search.h). No checks."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C


def search_scales(
    weights: Tensor,  # (R, K) fp32
    importance: Tensor | None,  # (R, K) fp32
    group: int,
    scales: Tensor,  # (R, groups) fp32
    steps: Tensor | None,  # (R, groups) fp32
    top: int,
    floats: tuple[int, int, float],  # digits, the exponent of the least one, the largest one
    table: Tensor,  # (E,) or (T, E) fp32, ascending
    ratios: Tensor,  # (C,) fp32
    chosen: Tensor | None = None,  # (R, groups) uint8: the tables of groups, if there are several
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # (R, groups) fp32, (R,) fp64, (R, groups) uint8
    """The best scales, never worse than those given, the errors of the rows, and the best of some tables for every
    group; all on the CPU.
    """
    found, errors, tables = _C.search_scales(
        weights.numpy(),
        None if importance is None else importance.numpy(),
        group,
        scales.numpy(),
        None if steps is None else steps.numpy(),
        top,
        floats,
        table.numpy(),
        ratios.numpy(),
        None if chosen is None else chosen.numpy(),
        torch.get_num_threads(),
        isa,
    )
    return torch.from_numpy(found), torch.from_numpy(errors), torch.from_numpy(tables)
