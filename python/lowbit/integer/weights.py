"""Integer weights: rounded one by one, or codes of a table that k-means fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.integer.execution import Codebook
from lowbit.integer.graph import Weighted
from lowbit.integer.rescaling import round_by
from lowbit.methods import kmeans

CODEBOOK_BITS = (2, 3, 4)


def integers(
    node: Weighted, steps: Tensor, bits: int, rounding: str, codebook: int | None
) -> tuple[Tensor, Codebook | None]:
    """A node's weight as integers of `bits`.

    Args:
        node: its weight (O, ...) is float64.
        steps: the size of a step, (O,) or (1,) float64.
        bits: of an integer, 8 or 16.
        rounding: one of `rescaling.ROUNDINGS`.
        codebook: bits of a code, for a table that all channels share, fitted to weight / steps with the squared step
            as importance; None for integers of their own. A weight that would take more bytes so keeps its integers.

    Returns:
        int64 of the weight's shape, and the codes whose values they are, if there are any.
    """
    shape = (-1, *(1 for _ in node.weight.shape[1:]))
    scaled = node.weight / steps.reshape(shape)
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if (
        codebook is None
        or codes_bytes(scaled.numel(), codebook, bits) >= scaled.numel() * bits // 8
    ):
        return round_by(scaled, rounding).clamp(least, most).long(), None
    points, order = scaled.flatten().to(torch.float32).sort()
    importance = (steps.reshape(shape) / steps.max()).square().expand_as(scaled).flatten()[order]
    entries = kmeans.centers(points[None], importance[None].contiguous(), 1 << codebook)[0]
    table = round_by(entries.to(torch.float64), rounding).clamp(least, most)
    table = torch.unique(table)
    codes = (scaled.unsqueeze(-1) - table).abs().argmin(-1)
    # Entries that became one integer leave room behind.
    filled = torch.zeros(1 << codebook, dtype=torch.int64, device="cpu")
    filled[: table.numel()] = table.long()
    return filled[codes], Codebook(codebook, filled, codes.to(torch.uint8))


def codes_bytes(count: int, codebook: int, bits: int) -> int:
    """Bytes of packed codes, with one behind them that the decoder reads, and of their table."""
    return math.ceil(count * codebook / 8) + 1 + (1 << codebook) * bits // 8
