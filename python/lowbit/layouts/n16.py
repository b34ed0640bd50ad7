"""The layout "n16", which the CPU kernels read: N in the lanes, padded to whole blocks of 64 columns and 32 weights
along K. Codes are flat uint8, as csrc/core/n16.h says; scales, zeros and table as `lanes.py` says, in blocks of 64.
Integer scales of 4 and 6 bits, and zeros that are such, are the bits of the 64 as `packing.pack_scales` makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import late, packing
from lowbit.formats import Format
from lowbit.layouts.base import Specs
from lowbit.layouts.lanes import LanesLayout

N16 = "n16"
BLOCK_N = 64  # csrc/core/n16.h kBlockN
CHUNK_K = 32  # csrc/core/n16.h kChunkK
_PACKED_BITS = {"uint4": 4, "uint6": 6, "int6": 6}


class N16Layout(LanesLayout):
    """The layout of the CPU kernels."""

    name = N16
    lanes = BLOCK_N

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        blocks, chunks = -(-n // BLOCK_N), -(-k // CHUNK_K)
        codes = ((blocks * chunks * BLOCK_N * CHUNK_K * format.bits // 8,), torch.uint8)
        specs = {**super().specs(format, n, k), "codes": codes}
        if bits := _PACKED_BITS.get(format.scale or ""):
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

    def pack_scales(self, scales: Tensor, format: Format) -> Tensor:
        """Integers of less than 8 bits are packed."""
        rows = self.from_rows(scales)
        bits = _PACKED_BITS.get(format.scale or "")
        return packing.pack_scales(rows, bits) if bits else rows

    def unpack_scales(self, scales: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_scales`."""
        if bits := _PACKED_BITS.get(format.scale or ""):
            scales = packing.unpack_scales(scales, bits, format.scale == "int6")
        return self.to_rows(scales, n)

    def pack_zeros(self, zeros: Tensor, format: Format) -> Tensor:
        """Integer zeros are centred, those that are as scales packed as these."""
        if format.zero == "min":
            return self.pack_scales(zeros, format)
        return super().pack_zeros(zeros, format)

    def unpack_zeros(self, zeros: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_zeros`."""
        if format.zero == "min":
            return self.unpack_scales(zeros, format, n)
        return super().unpack_zeros(zeros, format, n)

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Inverse of `pack`."""
        threads = torch.get_num_threads()
        made = late.unprepack(codes.numpy(), n, k, format.bits, format.base, threads)
        return torch.from_numpy(made)
