"""The layout "n16", which the CPU kernels read: N in the lanes, padded to whole blocks of 64 columns and 32 weights
along K. Codes are flat uint8, as csrc/core/n16.h says; scales, zeros and table as `lanes.py` says, in blocks of 64.
Integer scales of 4 and 6 bits, and zeros that are such, are the bits of the 64 as `packing.pack_scales` makes them.
Codes packed as trits are of 2 bits, but of each 256 along K 16 columns lie in 13 units, as csrc/core/trits.h says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import late
from lowbit.formats import INTEGER_SCALES, Format
from lowbit.layouts.base import Specs
from lowbit.layouts.lanes import LanesLayout

N16 = "n16"
_LANES = 16  # csrc/core/n16.h kUnitLanes
BLOCK_N = 64  # csrc/core/n16.h kBlockN
CHUNK_K = 32  # csrc/core/n16.h kChunkK
_UNIT_BYTES = 64  # csrc/core/n16.h kUnitBytes
_TRIT_UNITS = 13  # csrc/core/trits.h kTritUnits
_TRIT_CHUNKS = 8  # csrc/core/trits.h kTritChunks
_VECTORS = BLOCK_N // _LANES


class N16Layout(LanesLayout):
    """The layout of the CPU kernels."""

    name = N16
    lanes = BLOCK_N
    packs_scales = True

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        blocks, (spans, rest) = -(-n // BLOCK_N), _spans_and_rest(format, k)
        units = spans * _TRIT_UNITS + rest * format.bits
        codes = ((blocks * units * _VECTORS * _UNIT_BYTES,), torch.uint8)
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

    def unpack_by_division(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Codes, (N, K) int32."""
        blocks, chunks = -(-n // BLOCK_N), -(-k // CHUNK_K)
        spans, rest = _spans_and_rest(format, k)
        count = spans * _VECTORS * _TRIT_UNITS
        units = codes.int().view(blocks, count + rest * _VECTORS * format.bits, _UNIT_BYTES)
        if spans:
            expanded = _expand_by_division(units[:, :count].unflatten(1, (spans, _VECTORS, -1)))
            units = torch.cat((expanded, units[:, count:]), 1) if rest else expanded
        pairs = units.reshape(blocks, chunks, _VECTORS, format.bits, _LANES, 2, 2)
        # (blocks, chunks, vectors, lane, parity) of each unit
        words = (pairs[..., 0] + 256 * pairs[..., 1]).unbind(3)
        by_code = []
        for j in range(CHUNK_K // 2):
            pieces = _pieces(format.bits, j)
            found = [bit_field(words[u], shift, width) * 2**at for u, shift, width, at in pieces]
            by_code.append(sum(found[1:], found[0]))
        # (block, vector, lane, chunk, j, parity)
        rows = torch.stack(by_code, -1).permute(0, 2, 3, 1, 5, 4)
        return rows.reshape(blocks * BLOCK_N, chunks * CHUNK_K)[:n, :k]

    def integers_by_division(self, scales: Tensor, format: Format) -> Tensor:
        """Integer scales, or zeros that are such, int32, still in the lanes."""
        packed = scales.int()
        if format.scale == "int7":
            return torch.div(packed, 2, rounding_mode="floor")
        if not (bits := self.packed_bits(format)):
            return packed
        per, size = (4, 3) if bits == 6 else (2, 1)
        parts = packed.unflatten(-1, (-1, size)).unbind(-1)
        word = sum((part * 256**i for i, part in enumerate(parts[1:], 1)), parts[0])
        fields = [bit_field(word, bits * i, bits) for i in range(per)]
        made = torch.stack(fields, -1).flatten(-2)
        lowest = INTEGER_SCALES[format.scale or ""][0]
        return (made - lowest) % 2**bits + lowest


def _spans_and_rest(format: Format, k: int) -> tuple[int, int]:
    """Spans of chunks that lie as trits, and chunks of bits after them."""
    chunks = -(-k // CHUNK_K)
    spans = chunks // _TRIT_CHUNKS if format.packing == "trits" else 0
    return spans, chunks - spans * _TRIT_CHUNKS


def _expand_by_division(trits: Tensor) -> Tensor:
    """Bytes of spans of trits, (blocks, spans, vectors, 13, 64), as those of 2 bits, (blocks, units, 64), integers
    (csrc/core/trits.h).
    """
    fives = trits[:, :, :, :-1].unflatten(3, (3, 4))
    fifths, rest = _divide(fives, 85)
    f1, rest = _divide(rest, 27)
    f0, rest = _divide(rest, 9)
    f3, f2 = _divide(rest, 3)
    fields = f0 + 4 * ((3 - f1) % 3) + 16 * f2 + 64 * f3
    fifth = sum((fifths[..., t, :] * 4**t for t in range(1, 4)), fifths[..., 0, :])
    units = torch.cat((fields, fifth.unsqueeze(4)), 4).flatten(3, 4)
    units = torch.cat((units, trits[:, :, :, -1:]), 3).unflatten(3, (_TRIT_CHUNKS, 2))
    # (blocks, spans, chunks, vectors, units, 64)
    return units.transpose(2, 3).flatten(1, 4)


def _divide(values: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return torch.div(values, by, rounding_mode="floor"), values % by


def bit_field(words: Tensor, shift: int, width: int) -> Tensor:
    """Some bits of integers that are not negative, by division and remainder."""
    return torch.div(words, 2**shift, rounding_mode="floor") % 2**width


def _pieces(bits: int, j: int) -> list[tuple[int, int, int, int]]:
    """Where the bits of code j of a word column lie (csrc/core/n16.h place_of): unit, shift, width, bit of the code."""
    whole = 16 // bits
    if j < whole * bits:
        return [(j // whole, j % whole * bits, bits, 0)]
    if bits == 6:
        return [(j - 12, 12, 4, 0), (4 + (j - 12) // 2, 12 + j % 2 * 2, 2, 4)]
    return [(i, 15, 1, i) for i in range(bits)]
