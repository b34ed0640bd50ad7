"""Where the operands of a weight lie, one class a layout, and conversions to and from a QuantTensor."""

from lowbit.layouts.base import Layout
from lowbit.layouts.canonical import CANONICAL
from lowbit.layouts.k16 import K16
from lowbit.layouts.m16 import M16
from lowbit.layouts.n16 import N16
from lowbit.layouts.operands import (
    KernelWeight,
    Operands,
    canonical_tensors,
    factors_and_offset,
    from_kernel,
    group_terms,
    to_kernel,
    to_operands,
)
from lowbit.layouts.registry import LAYOUTS, find, fitting

__all__ = [
    "CANONICAL",
    "K16",
    "LAYOUTS",
    "M16",
    "N16",
    "KernelWeight",
    "Layout",
    "Operands",
    "canonical_tensors",
    "factors_and_offset",
    "find",
    "fitting",
    "from_kernel",
    "group_terms",
    "to_kernel",
    "to_operands",
]
