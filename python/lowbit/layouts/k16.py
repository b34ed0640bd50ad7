"""The layout "k16", which the Triton kernels read: codes are flat int32, bit planes, in plain torch on any device.

A chunk is 16 weights of a row. A plane holds p bits of each code, p one of 1, 2, 4, 8: word w of a block holds the
fields of weights w of 32 / p chunks, the first chunk in the low bits. A plane is [block][row][16 words]: a tile of
rows is one piece of memory. K is padded to whole blocks with zeros. Codes of 3, 5 and 6 bits take two planes, one after
the other, low bits first. Dtypes are those of "canonical". Scales and zeros are (groups, N), "uint4" and "int6"
packed along N as `packing.pack_scales` does; a second level (super-blocks, N), or as there. Table: fp32 (2^bits,),
padded with zeros, or (2, 2^bits), or (N, 2^bits), or (N, groups, 2^bits); none for integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import packing
from lowbit.formats import Format
from lowbit.layouts.base import Layout, Specs

K16 = "k16"
CHUNK = 16
# Rows are taken in slices of about this many codes, which bounds the int64 temporaries to 64 MiB.
_SLICE_CODES = 1 << 22


class K16Layout(Layout):
    """The layout of the Triton kernels."""

    name = K16
    packs_scales = True

    def packed_bits(self, format: Format) -> int:
        """None of "uint6": with zeros of 6 bits beside them, products of many rows ran out of registers."""
        return 0 if format.scale == "uint6" else super().packed_bits(format)

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        specs = super().specs(format, n, k)
        specs["codes"] = ((num_words(format.bits, n, k),), torch.int32)
        for name in {"scales", "zeros", "scales2", "zeros2"} & specs.keys():
            shape, dtype = specs[name]
            specs[name] = (shape[::-1], dtype)
        if bits := self.packed_bits(format):
            terms = (format.num_groups(k), -(-n // 4) * 4 * bits // 8), torch.uint8
            specs["scales"] = terms
            if format.zero == "min":
                specs["zeros"] = terms
        if format.codec != "affine" and "table" not in specs:
            specs["table"] = ((2**format.bits,), torch.float32)
        return specs

    def pack(self, codes: Tensor, format: Format, k: int) -> Tensor:
        """Codes in canonical packing, (N, row bytes), as they lie here."""
        return pack_planes(packing.unpack_codes(codes, format, k), format.bits)

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Inverse of `pack`."""
        return packing.pack_codes(unpack_planes(codes, format.bits, n, k), format)

    def from_rows(self, values: Tensor) -> Tensor:
        """Scales or zeros (N, groups) as they lie here. Differentiable."""
        return values.t().contiguous()

    def to_rows(self, values: Tensor, n: int) -> Tensor:
        """Inverse of `from_rows`. Differentiable."""
        return values.t()[:n]

    def fixed_table(self, format: Format) -> Tensor | None:
        """The table of a codebook; none for integers."""
        if format.codec == "affine":
            return None
        values = torch.tensor(format.values(), dtype=torch.float32, device="cpu")
        return F.pad(values, (0, 2**format.bits - values.numel()))


def plane_widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes of codes of `bits` bits, low bits first."""
    return {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(bits, (bits,))


def plane_blocks(bits: int, k: int) -> tuple[int, ...]:
    """Blocks of each plane along k."""
    return tuple(-(-k // (CHUNK * (32 // p))) for p in plane_widths(bits))


def num_words(bits: int, n: int, k: int) -> int:
    """32-bit words of all planes of an (n, k) weight."""
    return sum(plane_blocks(bits, k)) * n * CHUNK


def pack_planes(codes: Tensor, bits: int) -> Tensor:  # (N, K) uint8 -> (words,) int32
    """Packs codes below 2^bits."""
    n, k = codes.shape
    planes, low = [], 0
    for p, blocks in zip(plane_widths(bits), plane_blocks(bits, k), strict=True):
        plane = torch.empty((blocks, n, CHUNK), dtype=torch.int32, device=codes.device)
        shifts = (torch.arange(32 // p, dtype=torch.int64, device=codes.device) * p).view(-1, 1)
        for rows in _row_slices(n, k):
            fields = (codes[rows].long() >> low) & (2**p - 1)
            fields = F.pad(fields, (0, blocks * (32 // p) * CHUNK - k))
            words = (fields.view(-1, blocks, 32 // p, CHUNK) << shifts).sum(2)
            # Words of the upper half wrap around, as their bits demand.
            plane[:, rows] = words.to(torch.int32).transpose(0, 1)
        planes.append(plane.flatten())
        low += p
    return torch.cat(planes)


def unpack_planes(
    words: Tensor, bits: int, n: int, k: int
) -> Tensor:  # (words,) int32 -> (N, K) uint8
    """Inverse of `pack_planes`."""
    codes = torch.zeros((n, k), dtype=torch.uint8, device=words.device)
    low = start = 0
    for p, blocks in zip(plane_widths(bits), plane_blocks(bits, k), strict=True):
        plane = words[start : start + blocks * n * CHUNK].view(blocks, n, 1, CHUNK)
        shifts = (
            (torch.arange(32 // p, dtype=torch.int64, device=words.device) * p)
            .to(torch.int32)
            .view(-1, 1)
        )
        for rows in _row_slices(n, k):
            fields = (plane[:, rows] >> shifts) & (2**p - 1)  # (blocks, rows, chunks, 16)
            fields = fields.transpose(0, 1).reshape(-1, blocks * (32 // p) * CHUNK)[:, :k]
            codes[rows] |= fields.to(torch.uint8) << low
        start += blocks * n * CHUNK
        low += p
    return codes


def _row_slices(n: int, k: int) -> list[slice]:
    step = max(1, _SLICE_CODES // max(1, k))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]
