"""PrunedTensor: the weights that pruning left, as codes of one table and relative indices (Deep Compression, Han et al.
2016, arXiv 1510.00149).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import packing
from lowbit.formats import Format
from lowbit.weights.quantized import QuantTensor

INDEX_BITS = (4, 5, 8)


class PrunedTensor:
    """A sparse (N, K) matrix: entry i, in the order of rows, has the value table[codes[i]] and comes gaps[i] zeros
    after the entry before. A run of 2^index_bits zeros or more has fillers, entries of code 0, whose value is 0.

    Attributes:
        shape: (N, K).
        table: (2^bits,) fp32; table[0] is 0.
        codes: (entries,) uint8, below 2^bits.
        gaps: (entries,) uint8, below 2^index_bits.
        bits, index_bits: of a code, 1 to 8, and of a gap, one of `INDEX_BITS`; what a file stores of them.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape, table[0] is not 0, a value is too large, or the
            entries go beyond the matrix.
    """

    __slots__ = ("_packed", "bits", "codes", "gaps", "index_bits", "shape", "table")

    def __init__(
        self, shape: tuple[int, int], table: Tensor, codes: Tensor, gaps: Tensor, index_bits: int
    ) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be (out features, in features), got {tuple(shape)}")
        if index_bits not in INDEX_BITS:
            raise ValueError(f"index_bits must be one of {INDEX_BITS}, got {index_bits}")
        bits = (len(table) - 1).bit_length() if table.dim() == 1 else 0
        if table.dtype != torch.float32 or not 1 <= bits <= 8 or len(table) != 2**bits:
            raise ValueError(
                f"table must be float32 of shape (2^bits,), bits from 1 to 8, got {table.dtype} of shape "
                f"{tuple(table.shape)}"
            )
        if float(table[0]) != 0 or not bool(table.isfinite().all()):
            raise ValueError(
                f"table must be finite with 0 as its first entry, got {float(table[0])}"
            )
        for name, t, width in (("codes", codes, bits), ("gaps", gaps, index_bits)):
            if t.dtype != torch.uint8 or t.dim() != 1 or len(t) != len(codes):
                raise ValueError(
                    f"{name} must be uint8 of shape ({len(codes)},), got {t.dtype} of shape {tuple(t.shape)}"
                )
            if len(t) and (most := int(t.max())) >= 2**width:
                raise ValueError(f"{name} must be below {2**width}, got {most}")
        self.shape, self.table, self.codes, self.gaps = shape, table, codes, gaps
        self.bits, self.index_bits = bits, index_bits
        self._packed: object | None = None
        reached = int(gaps.sum(dtype=torch.int64)) + len(gaps)
        if reached > shape[0] * shape[1]:
            raise ValueError(
                f"gaps must stay within the {shape[0]} x {shape[1]} weights, they reach {reached}"
            )

    @classmethod
    def of(cls, qt: QuantTensor, index_bits: int = 5) -> PrunedTensor:
        """The entries of a quantized matrix that are not 0.

        Raises:
            ValueError: its values are not those of one table alone, with 0 as the first: method "prune" makes them so.
        """
        f = qt.format
        if not f.fitted or f.scale is not None or f.table_scope != "tensor" or f.more_terms:
            raise ValueError(
                "weight must be in a format with one fitted table and no scales, as Format.lut(bits=5, group=None, "
                f"scale=None), got {f.name!r}"
            )
        codes = qt.unpack().flatten()
        places = codes.nonzero().flatten()
        longest = 2**index_bits  # zeros that a filler stands for, itself included
        zeros = torch.diff(places, prepend=places.new_tensor([-1])) - 1
        last = (zeros // longest + 1).cumsum(0) - 1  # the entry of each weight, after its fillers
        count = int(last[-1]) + 1 if len(last) else 0
        gaps = torch.full((count,), longest - 1, dtype=torch.uint8, device=codes.device)
        kept = torch.zeros(count, dtype=torch.uint8, device=codes.device)
        gaps[last] = (zeros % longest).to(torch.uint8)
        kept[last] = codes[places]
        return cls(qt.shape, qt.tensors["table"].clone(), kept, gaps, index_bits)

    @property
    def format(self) -> Format:
        """That of `quant_tensor`."""
        return Format.lut(bits=self.bits, group=None, scale=None)

    @property
    def positions(self) -> Tensor:
        """Where the entries are in the flattened matrix, (entries,) int64, ascending."""
        return (self.gaps.long() + 1).cumsum(0) - 1

    def quant_tensor(self) -> QuantTensor:
        """The matrix with a code for every weight; what `of` was given, bit for bit.

        Raises:
            ValueError: codes of 7 bits, which no format has.
        """
        codes = self.codes.new_zeros(self.shape)
        codes.view(-1)[self.positions] = self.codes
        format = self.format
        tensors = {"codes": packing.pack_codes(codes, format), "table": self.table.clone()}
        return QuantTensor(format, self.shape, tensors)

    def dequantize(self) -> Tensor:
        """The matrix, (N, K) fp32."""
        dense = self.table.new_zeros(self.shape)
        dense.view(-1)[self.positions] = self.table[self.codes.long()]
        return dense

    @property
    def nbytes(self) -> int:
        """Bytes of codes and gaps, packed, and of the table; without entropy coding."""
        count = len(self.codes)
        return -(-count * self.bits // 8) + -(-count * self.index_bits // 8) + self.table.nbytes

    def __repr__(self) -> str:
        n, k = self.shape
        density = int((self.codes != 0).sum()) / (n * k)
        return f"PrunedTensor({n}x{k}, {density:.1%} kept, {self.bits} + {self.index_bits} bits, {self.nbytes} bytes)"
