"""Where the operands of a weight lie, one class a layout, and conversions to and from a QuantTensor."""

from lowbit.layouts.base import Layout
from lowbit.layouts.canonical import CANONICAL
from lowbit.layouts.k16 import K16
from lowbit.layouts.m16 import M16
from lowbit.layouts.n16 import N16
from lowbit.layouts.operands import (
    Added,
    KernelWeight,
    LowRankOperands,
    LowRankPlan,
    Operands,
    canonical_tensors,
    chosen_tables,
    factors_and_offset,
    from_kernel,
    group_terms,
    low_rank_tensors,
    to_kernel,
    to_operands,
)
from lowbit.layouts.pruned import PrunedOperands, pruned_operands
from lowbit.layouts.registry import LAYOUTS, find, fitting
from lowbit.layouts.rows import ROWS

__all__ = [
    "CANONICAL",
    "K16",
    "LAYOUTS",
    "M16",
    "N16",
    "ROWS",
    "Added",
    "KernelWeight",
    "Layout",
    "LowRankOperands",
    "LowRankPlan",
    "Operands",
    "PrunedOperands",
    "canonical_tensors",
    "chosen_tables",
    "factors_and_offset",
    "find",
    "fitting",
    "from_kernel",
    "group_terms",
    "low_rank_tensors",
    "pruned_operands",
    "to_kernel",
    "to_operands",
]
