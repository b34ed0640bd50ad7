"""CompositeWeight: a weight that is the sum of its terms, W = Q + S + ...

Each term is multiplied by an op of its own, and what the products add up to is rounded once. A format with outliers
(`Format.outliers`) is a QuantTensor that stores two terms together: `CompositeWeight.of` takes them apart.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm

Term: TypeAlias = QuantTensor | SparseTerm


class CompositeWeight:
    """A sum of one quantized matrix and any number of sparse terms, all (N, K) and on one device.

    Args:
        matrix: the quantized matrix Q, without outliers of its own.
        sparse: the terms S_i that are added to it.

    Raises:
        TypeError: a term is neither.
        ValueError: the terms differ in N or device, a column is not in [0, K), or the matrix has outliers.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "int4_g32")
        >>> s = SparseTerm(torch.zeros(64, 1, dtype=torch.int32), torch.ones(64, 1))
        >>> y = lowbit.linear(torch.randn(2, 128), CompositeWeight(qt, s))
    """

    __slots__ = ("matrix", "sparse")

    def __init__(self, matrix: QuantTensor, *sparse: SparseTerm) -> None:
        if not isinstance(matrix, QuantTensor):
            raise TypeError(f"matrix must be a QuantTensor, got {type(matrix).__name__}")
        if matrix.format.outliers:
            raise ValueError(
                f"matrix must have no outliers, got format {matrix.format.name!r}: use CompositeWeight.of"
            )
        n, k = matrix.shape
        for term in sparse:
            if not isinstance(term, SparseTerm):
                raise TypeError(f"sparse must be SparseTerms, got {type(term).__name__}")
            columns, values = term
            if columns.dim() != 2 or columns.shape[0] != n or values.shape != columns.shape:
                raise ValueError(
                    f"a sparse term of a {matrix.shape} weight must have columns and values of shape ({n}, P), got "
                    f"{tuple(columns.shape)} and {tuple(values.shape)}"
                )
            if columns.device != matrix.device or values.device != matrix.device:
                raise ValueError(
                    f"a sparse term must be on {matrix.device}, got {columns.device} and {values.device}"
                )
            wrong = columns[(columns < 0) | (columns >= k)]
            if wrong.numel():
                raise ValueError(f"columns must be in [0, {k}), got {int(wrong.flatten()[0])}")
        self.matrix, self.sparse = matrix, sparse

    @classmethod
    def of(cls, weight: QuantTensor) -> CompositeWeight:
        """The terms of a QuantTensor, on the same tensors; one without outliers is a sum of one."""
        columns, values = weight.outlier_columns, weight.outlier_values
        if columns is None or values is None:
            return cls(weight)
        return cls(weight.without_outliers, SparseTerm(columns, values))

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms, the matrix first."""
        return self.matrix, *self.sparse

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.matrix.shape

    @property
    def device(self) -> torch.device:
        """Where all terms are."""
        return self.matrix.device

    @property
    def nbytes(self) -> int:
        """Bytes of all terms."""
        return self.matrix.nbytes + sum(t.nbytes for term in self.sparse for t in term)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of a weight, of all terms."""
        n, k = self.shape
        return 8 * self.nbytes / max(1, n * k)

    def __repr__(self) -> str:
        kinds = ", ".join(
            [repr(self.matrix), *(f"{t.columns.shape[1]} a row" for t in self.sparse)]
        )
        return f"CompositeWeight({kinds})"
