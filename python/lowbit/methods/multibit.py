"""Multi-bit binary weights: sum_i a_i b_i with k vectors b_i of signs, as ABC-Net (Lin et al., arXiv
1711.11294) and LQ-Nets (Zhang et al., arXiv 1807.10029) use them.

The table of a format of k bits holds all 2^k signed sums, so the weights run on the kernels of any
codebook; bit i of a code is the sign b_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format, as_format
from lowbit.methods import fitting, grid, nearest
from lowbit.weights.quantized import QuantTensor

MAX_BITS = 4
# Keeps the normal equations solvable where two of the b_i are equal; a relative error of that size.
_RIDGE = 1e-12


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    weights: Tensor | None = None,
    iterations: int = 50,
) -> QuantTensor:
    """Fits the a_i of every table and chooses the nearest signed sum for every weight.

    Starts from the greedy a_i = mean|r|, b_i = sign r of what the bits before leave, then in turn
    chooses the nearest sums and solves for all a_i by least squares (alternating refinement, Xu et
    al., arXiv 1802.00150), and keeps the best a_i seen; no iteration makes the error larger. It is
    a table of 2^k entries with k degrees of freedom, so "kmeans" is never worse; with 2 bits any
    table that is symmetric about 0 is such a sum.

    Args:
        weight: (N, K) as in `rtn.quantize`; computed in fp32.
        format: a fitted format of 1 to 4 bits, as "kmeans2" and "kmeans3_pr"; its `table_scope` says
            whether the weight, each row or each group has its own a_i.
        weights: the importance of each weight, as in `kmeans.quantize`.
        iterations: of the refinement at most, not negative.

    Raises:
        TypeError, ValueError: as `kmeans.quantize`; the format has more than 4 bits, or iterations
            are negative.
    """
    format = as_format(format)
    if not format.fitted or format.bits > MAX_BITS:
        raise ValueError(
            f"method 'multibit' fits tables of 1 to {MAX_BITS} bits, such as 'kmeans2', got format "
            f"{format.name!r}"
        )
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    grid.check_weight(weight, format)
    importance = fitting.check_importance(weights, weight)
    qt = grid.start(weight, format)

    def solve(problems: fitting.Problems, entries: int) -> Tensor:
        return _tables(*problems.sorted_points(), entries.bit_length() - 1, iterations)

    fitting.fit_tables(qt, weight, importance, solve)
    grid.fill_codes(qt, weight)
    return qt


def _tables(points: Tensor, count: Tensor | None, bits: int, iterations: int) -> Tensor:
    """The signed sums for every row of points (R, C), which count (R, C) or 1: (R, 2^bits) fp32."""
    x = points.double()
    weight = torch.ones_like(x) if count is None else count
    weight = weight / weight.sum(1, keepdim=True)
    entries = torch.arange(2**bits, dtype=torch.int64, device=x.device)
    signs = (
        (entries[:, None] >> torch.arange(bits, dtype=torch.int64, device=x.device) & 1) * 2 - 1
    ).double()
    a, residual = x.new_empty(len(x), bits), x
    for i in range(bits):
        a[:, i] = (weight * residual.abs()).sum(1)
        residual = residual - torch.where(residual < 0, -a[:, i, None], a[:, i, None])
    best, least = a, torch.full_like(a[:, 0], torch.inf)
    for step in range(iterations + 1):
        table = a @ signs.T
        index = nearest.nearest_codes(points, table.float()).long()
        error = (weight * (x - table.gather(1, index)).square()).sum(1)
        better = error < least
        if not bool(better.any()):
            break
        best = torch.where(better[:, None], a, best)
        least = torch.where(better, error, least)
        if step < iterations:
            mass = torch.zeros_like(table).scatter_add_(1, index, weight)
            moment = torch.zeros_like(table).scatter_add_(1, index, weight * x)
            normal = torch.einsum("re,ei,ej->rij", mass, signs, signs)
            # The diagonal of the normal matrix is 1: all counts together.
            normal.diagonal(dim1=1, dim2=2).add_(_RIDGE)
            a = torch.linalg.solve(normal, (moment @ signs)[:, :, None])[:, :, 0]
    best = best.abs().sort(1, descending=True).values
    return (best @ signs.T).float().cpu()
