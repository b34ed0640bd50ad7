"""The portable layout, which files hold: codes as in `packing.py`; scales (N, groups), as stored;
zeros (N, groups); scales2 (N, super-blocks), one number for the weight, or the factors of "dq8" and then its offset;
zeros2; table: the fitted table, none if the format carries it. Outliers lie so in every layout, (N, P).
"""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format
from lowbit.layouts.base import Layout

CANONICAL = "canonical"


class CanonicalLayout(Layout):
    """The layout of a QuantTensor."""

    name = CANONICAL

    def fits(self, format: Format) -> bool:
        """Every format does."""
        return True

    def pack(self, codes: Tensor, format: Format, k: int) -> Tensor:
        """The codes themselves."""
        return codes

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """The codes themselves."""
        return codes
