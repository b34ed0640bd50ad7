"""The terms of a weight that an op is given: its operands, and what is added to their product."""

from __future__ import annotations

from typing import TypeAlias

from lowbit.backends import available
from lowbit.layouts import KernelWeight, Operands
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm

Weight: TypeAlias = QuantTensor | KernelWeight | Operands


def terms(weight: Weight) -> tuple[Operands, SparseTerm | None]:
    """The quantized matrix and the sparse term, if there is one; a QuantTensor is converted once.

    Raises:
        TypeError: it is no weight.
    """
    if isinstance(weight, Operands):
        return weight, None
    if isinstance(weight, QuantTensor):
        weight = kernel_weight(weight)
    if not isinstance(weight, KernelWeight):
        raise TypeError(
            f"weight must be a QuantTensor, KernelWeight or Operands, got {type(weight).__name__}"
        )
    return weight.operands, weight.sparse


def kernel_weight(qt: QuantTensor) -> KernelWeight:
    """The weight as its device's kernels read it, made once and kept."""
    if qt._packed is None:
        qt._packed = available.kernel_weight(qt)
    return qt._packed  # type: ignore[return-value]


def matrix(weight: Weight) -> Operands:
    """The operands of a weight that is nothing but a quantized matrix.

    Raises:
        TypeError: it is no weight.
        ValueError: it has a sparse term.
    """
    operands, sparse = terms(weight)
    if sparse is not None:
        raise ValueError(
            f"weight has outliers, {sparse.columns.shape[1]} a row: this product does not take them; "
            "lowbit.linear does"
        )
    return operands
