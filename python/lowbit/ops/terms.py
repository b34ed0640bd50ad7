"""The terms of a weight that an op is given: its operands, and what is added to their product."""

from __future__ import annotations

from typing import Any, TypeAlias

from lowbit.backends import available
from lowbit.layouts import Added, KernelWeight, LowRankOperands, Operands
from lowbit.weights.composite import CompositeWeight
from lowbit.weights.lowrank import LowRank
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm

Weight: TypeAlias = QuantTensor | CompositeWeight | KernelWeight | Operands


def terms(weight: Weight) -> tuple[Operands, tuple[Added, ...]]:
    """The quantized matrix and the terms that are added to it; a QuantTensor is converted once.

    Raises:
        TypeError: it is no weight.
    """
    if isinstance(weight, QuantTensor):
        weight = weight._packed or kernel_weight(weight)  # type: ignore[assignment]
    if isinstance(weight, KernelWeight):
        return weight.terms
    if isinstance(weight, CompositeWeight):
        return kernel_weight(weight.matrix).operands, tuple(map(_operands, weight.added))
    if not isinstance(weight, Operands):
        raise TypeError(
            f"weight must be a QuantTensor, CompositeWeight, KernelWeight or Operands, got "
            f"{type(weight).__name__}"
        )
    return weight, ()


def _operands(term: Any) -> Added:
    if not isinstance(term, LowRank):
        return term  # type: ignore[no-any-return]
    quantized = (kernel_weight(f).operands if isinstance(f, QuantTensor) else f for f in term)
    return LowRankOperands(*quantized)


def kernel_weight(qt: QuantTensor) -> KernelWeight:
    """The weight as its device's kernels read it, made once and kept."""
    if qt._packed is None:
        qt._packed = available.kernel_weight(qt)
    return qt._packed  # type: ignore[return-value]


def matrix(weight: Weight) -> Operands:
    """The operands of a weight that is nothing but a quantized matrix.

    Raises:
        TypeError: it is no weight.
        ValueError: it has another term.
    """
    operands, added = terms(weight)
    if not added:
        return operands
    what = "a low-rank term"
    if isinstance(added[0], SparseTerm):
        what = f"outliers, {added[0].columns.shape[1]} a row"
    raise ValueError(f"weight has {what}, which this product does not take; lowbit.linear does")
