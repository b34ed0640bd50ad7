"""BitNet (Wang et al., arXiv 2310.11453) and BitNet b1.58 (Ma et al., arXiv 2402.17764) as
post-training rounding: signs about the mean, and {-1, 0, 1} in units of mean|w|.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format, as_format
from lowbit.methods import grid
from lowbit.methods.scales import store
from lowbit.methods.twn import TERNARY
from lowbit.weights.quantized import QuantTensor

BINARY = (-1.0, 1.0)


@torch.no_grad()
def quantize(weight: Tensor, format: Format | str, *, granularity: str = "tensor") -> QuantTensor:
    """Scales are mean|w|; codes are sign(w - mean w), or round(w / scale) clipped to -1 .. 1.

    On N(0, 1) the ternary rule loses 0.2641 of the sum of squares and makes 31 % zeros, the binary
    one 1 - 2 / pi. Interpretation: w is divided by the scale as stored, without the papers' epsilon (a
    scale of 0 makes all weights 0), and ties of the ternary rule go to the even code. Without the
    mean the binary rule is `rtn` on "binary".

    Args:
        weight: (N, K) as in `rtn.quantize`; computed in fp32.
        format: one with scales and the table (-1, 1) for BitNet, such as "binary", or (-1, 0, 1) for
            b1.58, such as "ternary".
        granularity: what mean w and mean|w| are taken of: "tensor", as in the papers, or "group".

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format has another table or no scales.
    """
    format = as_format(format)
    if format.table not in (BINARY, TERNARY) or format.scale is None:
        raise ValueError(
            f"method 'bitnet' needs a format with scales and the table {BINARY} or {TERNARY}, such "
            f"as 'binary' or 'ternary', got {format.name!r}"
        )
    per_tensor = grid.check_granularity(granularity, format)
    grid.check_weight(weight, format)
    qt = grid.empty(weight, format)
    by_mean = dataclasses.replace(format, scale_rule="mean")
    store(qt, *grid.ranges(weight, by_mean, per_tensor))
    scale = reference.effective_scales(qt)
    assert scale is not None
    center = _means(weight, format, per_tensor) if format.table == BINARY else None
    group = reference.group_index(format, weight.shape[1], weight.device)
    for rows, w in grid.slices(weight):
        if center is None:
            codes = 1 + grid.scaled(w, format, scale[rows]).round().clamp(-1, 1)
        else:
            # Double quantization may give a small scale the wrong sign.
            above = (w.double() - center[rows][:, group]) * scale[rows][:, group].sign()
            codes = above > 0
        qt.tensors["codes"][rows] = torch.ops.lowbit.pack(codes.to(torch.uint8), format.spec)
    return qt


def _means(weight: Tensor, format: Format, per_tensor: bool) -> Tensor:  # (N, groups) fp64
    means = grid.reduce(weight, format, lambda g: g.double().mean(-1))
    if not per_tensor:
        return means
    total = (means * grid.group_sizes(weight, format)).sum()
    return (total / weight.numel()).expand_as(means)
