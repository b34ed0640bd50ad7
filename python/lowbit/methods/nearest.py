"""The nearest entry of a table."""

from __future__ import annotations

import torch
from torch import Tensor


class Nearest:
    """Finds the nearest entry of a table: ties go to the lower value, equal entries to the first of
    them. Called with values (R, C) fp32 it gives indices (R, C) uint8.
    """

    def __init__(self, table: Tensor) -> None:
        """`table`: (E,) or one for each row, (R, E), fp32 in any order."""
        entries, index = table.sort(dim=-1, stable=True)
        low, high = entries[..., :-1].double(), entries[..., 1:].double()
        exact = (low + high) / 2
        middle = exact.to(torch.float32)
        # Rounded down, an fp32 boundary compares with every fp32 value as the exact one does.
        below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        middle = torch.where(middle.double() > exact, below, middle)
        # Between equal entries there is no boundary: the next one takes its place.
        middle = torch.where(low == high, torch.inf, middle)
        self._middle = middle.flip(-1).cummin(-1).values.flip(-1).contiguous()
        self._index = index.to(torch.uint8)

    def __call__(self, values: Tensor) -> Tensor:
        position = torch.searchsorted(self._middle, values.contiguous())
        if self._index.dim() == 1:
            return self._index[position]
        return self._index.gather(1, position)


def nearest_codes(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of every value, as `Nearest` finds it."""
    return Nearest(table)(values)
