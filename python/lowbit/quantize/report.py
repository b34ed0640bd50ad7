"""What quantization did to a model: bytes and error per layer, and what was left as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit import reference
from lowbit.quantize import rtn
from lowbit.tensor import QuantTensor
from lowbit.text import printable


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight; sizes in bytes, bias not counted.

    Attributes:
        relative_error: ||W - W^|| / ||W||, Frobenius norms.
        max_error: the largest |W - W^|.
        tied_to: the layer whose bytes it shares, and which alone counts in totals.
    """

    name: str
    format: str
    shape: tuple[int, int]
    nbytes: int
    dense_nbytes: int
    relative_error: float
    max_error: float
    tied_to: str | None = None


@dataclass
class Report:
    """Rows per layer, and the modules or tensors that were left dense, with the reason."""

    layers: list[LayerReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def _counted(self) -> list[LayerReport]:
        return [row for row in self.layers if row.tied_to is None]

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(row.nbytes for row in self._counted)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same weights took before."""
        return sum(row.dense_nbytes for row in self._counted)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of a quantized weight."""
        return 8 * self.nbytes / max(1, sum(math.prod(row.shape) for row in self._counted))

    @property
    def relative_error(self) -> float:
        """Root mean square of the layers' relative errors."""
        squares = [row.relative_error**2 for row in self._counted]
        return math.sqrt(sum(squares) / max(1, len(squares)))

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data for JSON."""
        return {
            "layers": [dataclasses.asdict(row) for row in self.layers],
            "left": dict(self.left),
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.relative_error,
        }

    def __str__(self) -> str:
        head = ("layer", "format", "shape", "bytes", "dense", "rel. error", "max error")
        rows = [
            (
                row.name,
                row.format,
                f"{row.shape[0]}x{row.shape[1]}",
                f"{row.nbytes:,}" if row.tied_to is None else "tied",
                f"{row.dense_nbytes:,}",
                f"{row.relative_error:.3g}",
                f"{row.max_error:.3g}",
            )
            for row in self.layers
        ]
        total = f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits/weight"
        sizes = (f"{self.nbytes:,}", f"{self.dense_nbytes:,}", f"{self.relative_error:.3g}")
        lines = text_table([head, *rows, (total, "", "", *sizes, "")], left=3).splitlines()
        lines += [printable(f"left dense: {name} ({why})") for name, why in self.left.items()]
        return "\n".join(lines)


def text_table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells, made printable, in columns of equal width, of which the first `left` are aligned
    left.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@torch.no_grad()
def errors(weight: Tensor, qt: QuantTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of rows of a weight, fp32, and of what quantization took from them, W - W^, fp64."""
    scales = reference.effective_scales(qt)
    for rows, w in rtn.slices(weight):
        yield w, (w - reference.dequantize_rows(qt, rows, scales)).double()


def measure(name: str, weight: Tensor, qt: QuantTensor) -> LayerReport:
    """Compares a weight with what was made of it, slice by slice."""
    square = norm = largest = 0.0
    for w, error in errors(weight, qt):
        square += float(error.square().sum())
        norm += float(w.double().square().sum())
        largest = max(largest, float(error.abs().max()))
    relative = math.sqrt(square / norm) if norm else math.inf if square else 0.0
    dense = weight.numel() * weight.element_size()
    return LayerReport(name, qt.format.name, qt.shape, qt.nbytes, dense, relative, largest)
