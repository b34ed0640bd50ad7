"""k-means tables: for the scales that are stored, the tables that minimise sum importance * (W -
W^)^2.

One-dimensional k-means is solved exactly by dynamic programming (csrc/cpu/offline/kmeans.h); above 65536 points
(a whole matrix, or a very long row) the points are first averaged in bins (`fitting.py`): the only
thing given up is the freedom to split a bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu.kmeans import kmeans_rows
from lowbit.formats import Format, as_format
from lowbit.methods import fitting, grid
from lowbit.weights.quantized import QuantTensor


@torch.no_grad()
def quantize(weight: Tensor, format: Format | str, *, weights: Tensor | None = None) -> QuantTensor:
    """Fits the table of a format to `weight` and chooses the nearest code of every weight.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32. Scales as
            in `rtn`, where absmax is scaled to 1.
        format: a fitted format or its name ("kmeans4", "kmeans3_pr", `Format.lut(bits=3)`); its
            `table_scope` says whether the weight, each row or each group has a table.
        weights: the importance of each weight, finite and not negative: (N, K), a diagonal Fisher
            matrix, say (SqueezeLLM, arXiv 2306.07629; `lowbit.ptq.fisher_diagonal` collects one), or (K,), alike
            for all rows, as the diagonal of the second moment of the inputs. A table whose points
            all count 0 is fitted as if each counted 1.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format is not fitted; `weights` has another
            shape, another dtype or a value that is not allowed.
    """
    format = as_format(format)
    fitting.check_fitted(format, "kmeans")
    grid.check_weight(weight, format)
    weights = fitting.check_importance(weights, weight)
    qt = grid.start(weight, format)
    fitting.fit_tables(qt, weight, weights, solve)
    grid.fill_codes(qt, weight)
    return qt


def solve(problems: fitting.Problems, entries: int) -> Tensor:  # (R, entries) fp32 on the CPU
    """The best entries of every problem, ascending; equal ones where it has fewer distinct points."""
    return centers(*problems.sorted_points(), entries)


def centers(points: Tensor, count: Tensor | None, entries: int) -> Tensor:  # (R, entries) fp32
    """The best entries for points (R, C) fp32 in ascending order that count as much as `count`, (R,
    C) fp64, says, both on the CPU.
    """
    return kmeans_rows(points, count, entries)
