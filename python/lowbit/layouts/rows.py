"""The layout "rows", which the CPU kernels of structured formats read: as the canonical one, row by row, so that
nothing is copied. The table of vectors is as stored; that of E8P is `codebooks.lattice.kernel_table`, fp32 (256 or
512, 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.codebooks import lattice
from lowbit.formats import Format
from lowbit.layouts.base import Specs
from lowbit.layouts.canonical import CanonicalLayout

ROWS = "rows"


class RowsLayout(CanonicalLayout):
    """The layout of the CPU kernels of structured formats."""

    name = ROWS

    def fits(self, format: Format) -> bool:
        """Whether a format is structured."""
        return format.structured

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        specs = super().specs(format, n, k)
        if format.codec == "e8p":
            specs["table"] = (lattice.kernel_table(format.bits).shape, torch.float32)
        return specs

    def fixed_table(self, format: Format) -> Tensor | None:
        """That of E8P."""
        if format.codec != "e8p":
            return None
        return torch.from_numpy(lattice.kernel_table(format.bits).copy())
