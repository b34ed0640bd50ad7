"""CompositeWeight: a weight that is the sum of its terms, W = Q + S + L R + ...

Each term is multiplied by an op of its own, and what the products add up to is rounded once. A format with outliers
or a rank (`Format.outliers`, `Format.rank`) is a QuantTensor that stores two terms together: `CompositeWeight.of` takes
them apart.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from lowbit.weights.lowrank import LowRank
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm

Added: TypeAlias = SparseTerm | LowRank
Term: TypeAlias = QuantTensor | Added


class CompositeWeight:
    """A sum of one quantized matrix and any number of other terms, all (N, K) and on one device.

    Args:
        matrix: the quantized matrix Q, without outliers or a low-rank term of its own.
        added: the terms S_i and L_i R_i that are added to it.

    Raises:
        TypeError: a term is none of these.
        ValueError: the terms differ in shape or device, a column is not in [0, K), or the matrix has terms of its own.

    Example:
        >>> qt = lowbit.quantize(torch.randn(64, 128), "int4_g32")
        >>> s = SparseTerm(torch.zeros(64, 1, dtype=torch.int32), torch.ones(64, 1))
        >>> y = lowbit.linear(torch.randn(2, 128), CompositeWeight(qt, s))
    """

    __slots__ = ("added", "matrix")

    def __init__(self, matrix: QuantTensor, *added: Added) -> None:
        if not isinstance(matrix, QuantTensor):
            raise TypeError(f"matrix must be a QuantTensor, got {type(matrix).__name__}")
        if matrix.format.more_terms:
            raise ValueError(
                f"matrix must have no {matrix.format.more_terms}, got format {matrix.format.name!r}: use "
                "CompositeWeight.of"
            )
        n, k = matrix.shape
        for term in added:
            if isinstance(term, LowRank):
                term.check(n, k, matrix.device)
                continue
            if not isinstance(term, SparseTerm):
                raise TypeError(f"added must be SparseTerms or LowRanks, got {type(term).__name__}")
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
        self.matrix, self.added = matrix, added

    @classmethod
    def of(cls, weight: QuantTensor) -> CompositeWeight:
        """The terms of a QuantTensor, on the same tensors; a plain one is a sum of one."""
        if weight.format.rank:
            return cls(weight.matrix, LowRank(*weight.factors))
        columns, values = weight.outlier_columns, weight.outlier_values
        if columns is None or values is None:
            return cls(weight)
        return cls(weight.matrix, SparseTerm(columns, values))

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms, the matrix first."""
        return self.matrix, *self.added

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
        return self.matrix.nbytes + sum(t.nbytes for term in self.added for t in term)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of a weight, of all terms."""
        n, k = self.shape
        return 8 * self.nbytes / max(1, n * k)

    def __repr__(self) -> str:
        return f"CompositeWeight({', '.join([repr(self.matrix), *map(describe, self.added)])})"


def describe(term: Added) -> str:
    """A term in a few words."""
    if isinstance(term, SparseTerm):
        return f"{term.columns.shape[1]} a row"
    factor = term.left
    kind = factor.format.name if isinstance(factor, QuantTensor) else factor.dtype
    return f"rank {term.rank} in {str(kind).removeprefix('torch.')}"
