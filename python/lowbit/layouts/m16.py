"""The layout "m16", which the CUDA kernels read (csrc/cuda/m16.h): flat int32 codes, in plain torch on any device;
scales, zeros and table as `lanes.py` says, in blocks of 16.

A tile is 16 rows x 64 weights, in tiles (N/16, K/64) with code 0 beyond N and K. Lane 4 * (row % 8) + k / 2 % 4 of a
tile holds 32 codes, one string of bits, lowest first: by k / 16, k / 8 % 2, row / 8 and k % 2, the last the fastest.
Its words of 32 bits lie [word / g][lane][word % g], g = 4, 2 or 1, the largest that divides the bits of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import packing
from lowbit.formats import Format
from lowbit.layouts.base import Specs
from lowbit.layouts.lanes import LanesLayout

M16 = "m16"
TILE_N, TILE_K = 16, 64
_LANES = 32
# Rows of tiles are taken in slices of about this many codes, which bounds the int64 temporaries to 64 MiB for each bit.
_SLICE_CODES = 1 << 20


class M16Layout(LanesLayout):
    """The layout of the CUDA kernels."""

    name = M16
    lanes = TILE_N
    reads_codes = False

    def fits(self, format: Format) -> bool:
        """Whether a format has one table, no integer scales, and groups of 16, 32, multiples of 64 or whole rows."""
        whole_tiles = format.group is None or format.group in (16, 32) or format.group % 64 == 0
        one_table = format.table_scope == "tensor" and not format.integer_scales
        return super().fits(format) and one_table and whole_tiles

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        codes = ((num_words(format.bits, n, k),), torch.int32)
        return {**super().specs(format, n, k), "codes": codes}

    def pack(self, codes: Tensor, format: Format, k: int) -> Tensor:
        """Codes in canonical packing, (N, row bytes), as they lie here."""
        return pack_fragments(packing.unpack_codes(codes, format, k), format.bits)

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Inverse of `pack`."""
        return packing.pack_codes(unpack_fragments(codes, format.bits, n, k), format)


def num_words(bits: int, n: int, k: int) -> int:
    """32-bit words of an (n, k) weight."""
    return -(-n // TILE_N) * -(-k // TILE_K) * _LANES * bits


def pack_fragments(codes: Tensor, bits: int) -> Tensor:  # (N, K) uint8 -> (words,) int32
    """Packs codes below 2^bits."""
    n, k = codes.shape
    words = torch.empty(num_words(bits, n, k), dtype=torch.int32, device=codes.device)
    for rows, part in _slices(words, bits, n, k):
        block = F.pad(codes[rows], (0, -k % TILE_K, 0, -codes[rows].shape[0] % TILE_N))
        # (tile n, row / 8, row % 8, tile k, k / 16, k / 8 % 2, k / 2 % 4, k % 2)
        parts = block.view(-1, 2, 8, block.shape[1] // TILE_K, 4, 2, 4, 2)
        strings = parts.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(-1, _LANES * TILE_N * 2, 1)
        single = (strings.long() >> torch.arange(bits, dtype=torch.int64, device=codes.device)) & 1
        fields = single.reshape(-1, _LANES, bits, 32) << torch.arange(
            32, dtype=torch.int64, device=codes.device
        )
        # A word whose highest bit is set wraps around, as it must.
        lanes = fields.sum(-1).to(torch.int32).view(-1, _LANES, bits // _group(bits), _group(bits))
        part.copy_(lanes.transpose(1, 2).reshape(-1))
    return words


def unpack_fragments(
    words: Tensor, bits: int, n: int, k: int
) -> Tensor:  # (words,) int32 -> (N, K) uint8
    """Inverse of `pack_fragments`."""
    codes = torch.empty((n, k), dtype=torch.uint8, device=words.device)
    for rows, part in _slices(words, bits, n, k):
        lanes = part.view(-1, bits // _group(bits), _LANES, _group(bits)).transpose(1, 2)
        single = (
            lanes.reshape(-1, bits, 1) >> torch.arange(32, dtype=torch.int64, device=words.device)
        ) & 1
        fields = single.reshape(-1, 32, bits) << torch.arange(
            bits, dtype=torch.int64, device=words.device
        )
        strings = fields.sum(-1).to(torch.uint8).view(-1, -(-k // TILE_K), 8, 4, 4, 2, 2, 2)
        block = strings.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(-1, -(-k // TILE_K) * TILE_K)
        codes[rows] = block[: codes[rows].shape[0], :k]
    return codes


def _group(bits: int) -> int:
    return next(g for g in (4, 2, 1) if bits % g == 0)


def _slices(words: Tensor, bits: int, n: int, k: int) -> list[tuple[slice, Tensor]]:
    """Rows of whole tiles, and their words."""
    row_words = num_words(bits, TILE_N, k)
    step = max(1, _SLICE_CODES // max(1, TILE_N * k))
    return [
        (slice(i * TILE_N, (i + step) * TILE_N), words[i * row_words : (i + step) * row_words])
        for i in range(0, -(-n // TILE_N), step)
    ]
