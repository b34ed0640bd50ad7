"""PrunedOperands: a pruned weight as its kernels read it, sixteen rows side by side (csrc/cpu/sparse/pruned.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.weights.pruned import PrunedTensor

ROWS = 16  # of a block
_LONGEST = 255  # a distance is a byte


class PrunedOperands(NamedTuple):
    """Attributes:
    entries: (steps, 2, 16) uint8: of 16 rows the distance from the entry before, less 1, and the code.
    starts: (ceil(N / 16) + 1,) int64: the first step of each block of rows, and their number.
    table: (2^bits,) fp32, table[0] is 0.
    n: N.
    """

    entries: Tensor
    starts: Tensor
    table: Tensor
    n: int


def pruned_operands(weight: PrunedTensor) -> PrunedOperands:
    """The operands of a pruned weight, on its device; no fillers but those that a row needs."""
    n, k = weight.shape
    device = weight.codes.device
    kept = weight.codes != 0
    positions, codes = weight.positions[kept], weight.codes[kept]
    row, column = positions // k, positions % k
    # Zeros between an entry and the one before in its row.
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    zeros = torch.where(first, column, column - column.roll(1) - 1)
    # The number of each entry in its row, behind the fillers, of which one stands for 256 zeros.
    longest = _LONGEST + 1
    passed = (zeros // longest + 1).cumsum(0)
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    counts.index_add_(0, row, zeros // longest + 1)
    number = passed - 1 - (counts.cumsum(0) - counts)[row]
    blocks = -(-n // ROWS)
    steps = torch.nn.functional.pad(counts, (0, blocks * ROWS - n)).view(blocks, ROWS).amax(1)
    starts = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
    entries = torch.empty((int(starts[-1]), 2, ROWS), dtype=torch.uint8, device=device)
    entries[:, 0], entries[:, 1] = _LONGEST, 0
    step = starts[row // ROWS] + number
    entries[step, 0, row % ROWS] = (zeros % longest).to(torch.uint8)
    entries[step, 1, row % ROWS] = codes
    return PrunedOperands(entries, starts, weight.table, n)
