"""The layout "n16", which the CPU kernels read: N in the lanes, padded to whole blocks of 64 columns and 32 weights
along K. Codes are flat uint8, as csrc/core/n16.h says; scales, zeros and table as `lanes.py` says, in blocks of 64.
Integer scales of 4 and 6 bits, and zeros that are such, are the bits of the 64 as `packing.pack_scales` makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import late
from lowbit.formats import Format
from lowbit.layouts.base import Specs
from lowbit.layouts.lanes import LanesLayout

N16 = "n16"
BLOCK_N = 64  # csrc/core/n16.h kBlockN
CHUNK_K = 32  # csrc/core/n16.h kChunkK


class N16Layout(LanesLayout):
    """The layout of the CPU kernels."""

    name = N16
    lanes = BLOCK_N
    packs_scales = True

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        blocks, chunks = -(-n // BLOCK_N), -(-k // CHUNK_K)
        codes = ((blocks * chunks * BLOCK_N * CHUNK_K * format.bits // 8,), torch.uint8)
        specs = {**super().specs(format, n, k), "codes": codes}
        if bits := self.packed_bits(format):
            terms = (blocks, format.num_groups(k), BLOCK_N * bits // 8), torch.uint8
            specs["scales"] = terms
            if format.zero == "min":
                specs["zeros"] = terms
        return specs

    def pack(self, codes: Tensor, format: Format, k: int) -> Tensor:
        """Codes in canonical packing, on the CPU, as they lie here."""
        packed, threads = codes.contiguous().numpy(), torch.get_num_threads()
        made = late.prepack(packed, codes.shape[0], k, format.bits, format.base, threads)
        return torch.from_numpy(made)

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Inverse of `pack`."""
        threads = torch.get_num_threads()
        made = late.unprepack(codes.numpy(), n, k, format.bits, format.base, threads)
        return torch.from_numpy(made)
