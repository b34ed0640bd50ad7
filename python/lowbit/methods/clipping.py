"""Where the range of a uniform quantizer ends if its largest values may saturate.

Functions of values, errors or counts; `rtn` takes ranges of weights from them, `observers` those of
activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# FQ-ViT (Lin et al., arXiv 2111.13824): what its percentile observer keeps, and its OMSE grid of 90
# ranges that shrink by 1 % each.
PERCENTILE = 0.99999
_FACTORS = tuple(1 - i / 100 for i in range(90))
# Bins of a histogram of |x| (Migacz, "8-bit inference with TensorRT", 2017).
BINS = 2048


def check_percentile(percentile: float) -> None:
    """Raises ValueError unless it is a fraction above 0.5 and at most 1."""
    if not 0.5 < percentile <= 1:
        raise ValueError(f"percentile must be above 0.5 and at most 1, got {percentile}")


def quantile(values: Tensor, fraction: float) -> Tensor:  # (..., G) -> (...) fp64
    """The quantile of the last dimension, linear between neighbours in order, of any size."""
    position = fraction * (values.shape[-1] - 1)
    below = math.floor(position)
    low = values.kthvalue(below + 1, -1).values.double()
    if below == position:
        return low
    high = values.kthvalue(below + 2, -1).values.double()
    return low + (high - low) * (position - below)


def least_error(
    low: Tensor, high: Tensor, error: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the ranges f * (low, high), f = 1, 0.99, ..., 0.11, the one with the least error.

    The grid of OMSE in FQ-ViT (Choukroun et al., arXiv 1902.06822, search it otherwise). Among equal
    errors the widest range counts.

    Args:
        low, high: ends of the ranges, of one shape.
        error: what each range costs, in that shape.
    """
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for factor in _FACTORS:
        cost = error(low * factor, high * factor)
        better = cost < least
        best = torch.where(better, factor, best)
        least = torch.where(better, cost, least)
    return low * best, high * best


def entropy_threshold(counts: Tensor, levels: int) -> int:
    """How many bins of a histogram of |x| to keep so that the fewest nats are lost.

    For i = levels, ..., bins: P is the first i bins with everything beyond them added to the last;
    Q is the first i bins averaged over `levels` runs of bins, where P is not 0. The i with the least
    KL(P || Q) wins (Migacz 2017). Interpretation: runs are as equal as can be, i = bins (no clipping)
    takes part, an i whose Q is 0 where P is not is out, and among equals the largest i wins.

    Args:
        counts: (bins,), not negative, at least one positive.
        levels: quantization levels of |x|, 2^(bits - 1).
    """
    bins = len(counts)
    if bins <= levels:
        return bins
    p = counts.double().cpu()
    total = p.sum()
    kept = torch.arange(levels, bins + 1, dtype=torch.int64, device="cpu")
    last = p[kept - 1]
    beyond = total - p.cumsum(0)[kept - 1]
    # Sums over the first bins: of counts, of counts that are not 0, of p log p.
    before = [torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in (p, (p > 0).double())]
    edges = torch.arange(levels + 1, dtype=torch.int64, device="cpu")
    edges = kept[:, None] * edges // levels
    inside, used = (t[edges].diff(dim=1) for t in before)
    used[:, -1] += (last == 0) & (beyond > 0)
    mean = torch.where(used > 0, inside / used, 0.0)
    log_p = torch.nn.functional.pad(torch.xlogy(p, p).cumsum(0), (1, 0))[kept - 1]
    log_p = log_p + torch.xlogy(last + beyond, last + beyond)
    log_q = torch.xlogy(inside, mean).sum(1) + torch.xlogy(beyond, mean[:, -1])
    # sum P / total * log((P / total) / (Q / sum Q)), where the sum of P is the total.
    divergence = (log_p - log_q) / total - total.log() + (total - beyond).log()
    divergence = divergence.nan_to_num(nan=torch.inf)
    return int(kept[len(kept) - 1 - int(divergence.flip(0).argmin())])
