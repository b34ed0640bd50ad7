"""A layout: how the operands of a weight lie. What a layout does not override lies as in the canonical one."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import packing
from lowbit.formats import INTEGER_SCALES, Format
from lowbit.weights.quantized import tensor_specs

# Shape and dtype of each operand; one that is absent has no entry.
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]

# Scales of which kernels form the fp32 number, and the dtype of what they read; bytes where torch has float8.
CODE_DTYPES = {
    **dict.fromkeys(INTEGER_SCALES, torch.int8),
    "e4m3": torch.uint8,
    "e8m0": torch.uint8,
    "dq8": torch.uint8,
}
# The scales that an op reads of other kinds and layouts: a second level is multiplied out, a power of two is a bf16
# value.
_PRODUCT_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.bfloat16,
    "e4m3": torch.float32,
    "dq8": torch.float32,
}


class Layout:
    """Where the bytes of codes, scales, zeros and table lie. Every method has an inverse, bit for bit."""

    name: str
    # Whether kernels of this layout read scales as stored, `CODE_DTYPES`.
    reads_codes = True
    # Whether integer scales of less than 8 bits, and zeros that are such, are packed along the last dimension.
    packs_scales = False

    def fits(self, format: Format) -> bool:
        """Whether weights of a format can lie so: here, those with a code for each weight."""
        return not format.structured

    def specs(self, format: Format, n: int, k: int) -> Specs:
        """What the operands of an (n, k) weight are."""
        specs = tensor_specs(format, n, k)
        if self.keeps_codes(format):
            specs["scales"] = (specs["scales"][0], CODE_DTYPES[format.scale or ""])
            if specs.pop("scales2_offset", None) is not None:
                factors, dtype = specs["scales2"]
                specs["scales2"] = ((factors[0] + 1,), dtype)  # and the offset
            return specs
        for name in ("scales2", "scales2_offset"):
            specs.pop(name, None)
        if format.scale is not None:
            specs["scales"] = ((n, format.num_groups(k)), _PRODUCT_DTYPES[format.scale])
        return specs

    def keeps_codes(self, format: Format) -> bool:
        """Whether the operands hold the scales of a format as stored, with their second level if they have one."""
        return self.reads_codes and format.scale in CODE_DTYPES

    def packed_bits(self, format: Format) -> int:
        """Bits of the integer scales of a format if they are packed here, else 0."""
        return packing.scale_bits(format) if self.packs_scales else 0

    def pack(self, codes: Tensor, format: Format, k: int) -> Tensor:
        """Codes in canonical packing, (N, row bytes), as they lie here."""
        raise NotImplementedError

    def unpack(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """Inverse of `pack`."""
        raise NotImplementedError

    def unpack_by_division(self, codes: Tensor, format: Format, n: int, k: int) -> Tensor:
        """`unpack`, a code an element, by arithmetic that exporters of graphs know."""
        raise self._unknown_to_exporters()

    def integers_by_division(self, scales: Tensor, format: Format) -> Tensor:
        """Integer scales as numbers by such arithmetic, in the order in which they lie."""
        raise self._unknown_to_exporters()

    def _unknown_to_exporters(self) -> NotImplementedError:
        return NotImplementedError(
            f"weights of layout {self.name!r} are not exported: only those on the CPU with a code for each weight are"
        )

    def from_rows(self, values: Tensor) -> Tensor:
        """Scales or float zeros (N, groups), or their second level, as they lie here. Differentiable."""
        return values

    def to_rows(self, values: Tensor, n: int) -> Tensor:
        """Inverse of `from_rows`, also of zeros as they lie here. Differentiable."""
        return values

    def pack_scales(self, scales: Tensor, format: Format) -> Tensor:
        """Scales (N, groups) as they lie here. Differentiable where they are numbers."""
        rows, bits = self.from_rows(scales), self.packed_bits(format)
        return packing.pack_scales(rows, bits) if bits else rows

    def unpack_scales(self, scales: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_scales`."""
        if bits := self.packed_bits(format):
            scales = packing.unpack_scales(scales, bits, format.scale == "int6")
        return self.to_rows(scales, n)

    def pack_zeros(self, zeros: Tensor, format: Format) -> Tensor:
        """Zeros (N, groups), integers included, as they lie here; those of kind "min" as scales."""
        return self.pack_scales(zeros, format) if format.zero == "min" else self.from_rows(zeros)

    def unpack_zeros(self, zeros: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_zeros`."""
        if format.zero == "min":
            return self.unpack_scales(zeros, format, n)
        return self.to_rows(zeros, n)

    def fixed_table(self, format: Format) -> Tensor | None:
        """The table operand of a format that is not fitted, on the CPU; None if kernels need none."""
        return None

    def pack_table(self, table: Tensor, format: Format) -> Tensor:
        """A fitted table, (E,), (2, E), (N, E) or (N, groups, E) by scope, as it lies here. Differentiable."""
        return table

    def unpack_table(self, table: Tensor, format: Format, n: int) -> Tensor:
        """Inverse of `pack_table`; a fixed table stays as it is. Differentiable."""
        return table
