"""The terms of a weight that an op is given: its operands, and what is added to their product."""

from __future__ import annotations

from typing import TypeAlias

from lowbit.backends import available
from lowbit.layouts import KernelWeight, Operands
from lowbit.weights.composite import CompositeWeight
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm

Weight: TypeAlias = QuantTensor | CompositeWeight | KernelWeight | Operands


def terms(weight: Weight) -> tuple[Operands, tuple[SparseTerm, ...]]:
    """The quantized matrix and the sparse terms that are added to it; a QuantTensor is converted once.

    Raises:
        TypeError: it is no weight.
    """
    if isinstance(weight, QuantTensor):
        weight = weight._packed or kernel_weight(weight)  # type: ignore[assignment]
    if isinstance(weight, KernelWeight):
        return weight.terms
    if isinstance(weight, CompositeWeight):
        return kernel_weight(weight.matrix).operands, weight.sparse
    if not isinstance(weight, Operands):
        raise TypeError(
            f"weight must be a QuantTensor, CompositeWeight, KernelWeight or Operands, got "
            f"{type(weight).__name__}"
        )
    return weight, ()


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
    if sparse:
        raise ValueError(
            f"weight has outliers, {sparse[0].columns.shape[1]} a row: this product does not take them; "
            "lowbit.linear does"
        )
    return operands
