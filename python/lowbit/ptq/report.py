"""What quantization did to a model: bytes and error per layer, and what was left as it was."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowbit.methods.errors import norms, output_norm
from lowbit.nn.names import listed
from lowbit.text import html_table, printable
from lowbit.weights.quantized import QuantTensor

# A larger share of the weights that stays dense unasked is worth a warning.
UNASKED_SHARE = 0.05


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight; sizes in bytes, bias not counted.

    Attributes:
        relative_error: ||W - W^|| / ||W||, Frobenius norms.
        max_error: the largest |W - W^|.
        tied_to: the layer whose bytes it shares, and which alone counts in totals.
        note: what was done otherwise than asked for, and why.
        output_error: ||X (W - W^)^T|| / ||X W^T|| for the calibration's inputs X, where their second moment is known
            (methods that take a Hessian).
    """

    name: str
    format: str
    shape: tuple[int, int]
    nbytes: int
    dense_nbytes: int
    relative_error: float
    max_error: float
    tied_to: str | None = None
    note: str | None = None
    output_error: float | None = None


@dataclass
class Report:
    """What became of every parameter of two or more dimensions.

    Attributes:
        layers: rows per quantized layer.
        left: the reason for everything that was left as it is, by the name of the module, of a
            checkpoint that of the tensor; the reason names the parameters that are not the module's
            `weight`.
        dense_weights: how many weights each parameter that was left holds, by the parameter's name;
            0 if another name of it is there.
        unasked: those parameters of them that nobody asked to leave: they are neither skipped nor
            outside of the recipe, nor embeddings without a recipe.
        packed_before: how many weights were quantized before.
    """

    layers: list[LayerReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    dense_weights: dict[str, int] = field(default_factory=dict)
    unasked: list[str] = field(default_factory=list)
    packed_before: int = 0

    def leave(
        self, name: str, why: str, parameters: dict[str, int] | None = None, asked: bool = False
    ) -> None:
        """Notes why something stays as it is.

        Args:
            name: of the module or tensor; what was noted of it before stays.
            parameters: how many weights it holds, by the names of its parameters.
            asked: whether the user asked for it.
        """
        self.left[name] = f"{self.left[name]}; {why}" if name in self.left else why
        self.dense_weights.update(parameters or {})
        if not asked:
            self.unasked += parameters or {}

    @property
    def packed_share(self) -> float | None:
        """The share of the weights in parameters of two or more dimensions that is packed; None if
        what was left has not been counted.
        """
        if self.left and not self.dense_weights and not self.packed_before:
            return None
        packed = self.packed_before + sum(math.prod(row.shape) for row in self._counted)
        return packed / max(1, packed + sum(self.dense_weights.values()))

    def warn_unasked(self, planned: int, stacklevel: int = 2) -> None:
        """Warns if more than 5 % of the weights stay dense that nobody asked to leave.

        Args:
            planned: how many weights will be packed.
            stacklevel: as in `warnings.warn`.
        """
        sizes = {name: self.dense_weights[name] for name in self.unasked}
        total = planned + self.packed_before + sum(self.dense_weights.values())
        unasked = sum(sizes.values())
        if unasked > UNASKED_SHARE * total:
            largest = sorted(sizes, key=lambda name: -sizes[name])
            warnings.warn(
                f"{unasked / total:.0%} of the weights stay dense and cannot be quantized: "
                f"{listed(largest)} (the report's `left` says why; what `skip` names is left "
                "without this warning)",
                stacklevel=stacklevel + 1,
            )

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
            "packed_share": self.packed_share,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.relative_error,
        }

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for every layer, and the fields of `LayerReport` as columns.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas"
            ) from None
        fields = [field.name for field in dataclasses.fields(LayerReport)]
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.layers], columns=fields)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table: a head, a row for every layer, and totals."""
        outputs = any(row.output_error is not None for row in self.layers)
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
        made: list[tuple[str, ...]] = [head, *rows, (total, "", "", *sizes, "")]
        if not outputs:
            return made
        errors = ["" if r.output_error is None else f"{r.output_error:.3g}" for r in self.layers]
        last = ["output error", *errors, ""]
        return [(*cells, error) for cells, error in zip(made, last, strict=True)]

    def _repr_html_(self) -> str:
        """In a notebook."""
        head, *rows = self._cells()
        return html_table(head, rows, " | ".join(self._remarks()) or "report")

    def __str__(self) -> str:
        return "\n".join([*text_table(self._cells(), left=3).splitlines(), *self._remarks()])

    def _remarks(self) -> list[str]:
        lines = []
        if self.packed_share is not None:
            lines.append(f"{self.packed_share:.1%} of the weights in matrices are packed")
        lines += [printable(f"{row.name}: {row.note}") for row in self.layers if row.note]
        lines += [
            printable(f"left dense: {name or 'the model'} ({why})")
            for name, why in self.left.items()
        ]
        return lines


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


def measure(
    name: str, weight: Tensor, qt: QuantTensor, hessian: Tensor | None = None
) -> LayerReport:
    """Compares a weight with its quantization, slice by slice; with the second moment of its inputs, (K, K) up to a
    factor, its outputs as well.
    """
    relative, largest = norms(weight, qt)
    dense = weight.numel() * weight.element_size()
    output = None if hessian is None else output_norm(weight, qt, hessian)
    return LayerReport(
        name, qt.format.name, qt.shape, qt.nbytes, dense, relative, largest, output_error=output
    )
