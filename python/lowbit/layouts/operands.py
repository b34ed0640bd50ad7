"""Operands: the tensors that an op takes, in a named layout; KernelWeight: a QuantTensor as kernels read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowbit import modes, reference, strides
from lowbit.float8 import e8m0_values
from lowbit.forking import alone_after_fork
from lowbit.formats import Format, parse
from lowbit.layouts.base import CODE_DTYPES
from lowbit.layouts.canonical import CANONICAL
from lowbit.layouts.registry import LAYOUTS, find
from lowbit.weights.quantized import (
    FACTOR_TENSORS,
    FACTORS,
    SCALE_DTYPES,
    QuantTensor,
    factor_shapes,
    tensor_specs,
)
from lowbit.weights.sparse import SparseTerm

# The fields of Operands as torch.library wants them.
SCHEMA = (
    "Tensor codes, Tensor? scales, Tensor? zeros, Tensor? table, Tensor? scales2, Tensor? zeros2, "
    "str format, str layout, SymInt n, SymInt k"
)
# Canonical tensors that a two-level scale needs besides its fp32 product; `KernelWeight.second` keeps them.
_SECOND_LEVEL = ("scales", "scales2", "scales2_offset")


class Operands(NamedTuple):
    """What an op reads of one quantized matrix: `Layout.specs` gives shapes and dtypes of the tensors."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    scales2: Tensor | None
    zeros2: Tensor | None
    spec: str  # `Format.spec` of a format without other terms
    layout: str
    n: int
    k: int

    @property
    def format(self) -> Format:
        """The format of `spec`."""
        return parse(self.spec)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that are tensors, in the order of `TENSORS`."""
        return self[: len(TENSORS)]  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.n, self.k


TENSORS = tuple(name for name in Operands._fields if name not in ("spec", "layout", "n", "k"))


class LowRankOperands(NamedTuple):
    """L (N, r) and R (r, K) of a low-rank term as kernels read them, both dense or both quantized."""

    left: Tensor | Operands
    right: Tensor | Operands

    @property
    def n(self) -> int:
        """N."""
        return self.left.n if isinstance(self.left, Operands) else self.left.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that are there."""
        found = (f.tensors if isinstance(f, Operands) else (f,) for f in self)
        return tuple(t for each in found for t in each if t is not None)

    def map(self, fn: Callable[[Tensor], Tensor]) -> LowRankOperands:
        """The same term with `fn` applied to each tensor."""
        return LowRankOperands(*(_map(f, fn) if isinstance(f, Operands) else fn(f) for f in self))


Added: TypeAlias = SparseTerm | LowRankOperands


def _map(operands: Operands, fn: Callable[[Tensor], Tensor]) -> Operands:
    tensors = (None if t is None else fn(t) for t in operands.tensors)
    return Operands(*tensors, *operands[len(TENSORS) :])  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class KernelWeight:
    """A weight as kernels read it: its terms, and what is needed to make the QuantTensor again, bit for bit.

    Attributes:
        format: of the whole weight.
        operands: the quantized matrix.
        sparse: the outliers, if the format has any.
        second: canonical scales that cannot be recovered from the products in `operands`.
        lowrank: the low-rank term, if the format has a rank.
    """

    format: Format
    operands: Operands
    sparse: SparseTerm | None
    second: dict[str, Tensor]
    lowrank: LowRankOperands | None = None
    # The operands and the terms that are added, made once.
    terms: tuple[Operands, tuple[Added, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        added = tuple(t for t in (self.sparse, self.lowrank) if t is not None)
        object.__setattr__(self, "terms", (self.operands, added))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.operands.shape

    @property
    def layout(self) -> str:
        """How the operands lie."""
        return self.operands.layout

    @property
    def nbytes(self) -> int:
        """Bytes that kernels read."""
        lowrank = () if self.lowrank is None else self.lowrank.tensors
        given = (*self.operands.tensors, *(self.sparse or ()), *lowrank)
        return sum(t.nbytes for t in given if t is not None)

    def map(self, fn: Callable[[Tensor], Tensor]) -> KernelWeight:
        """The same weight with `fn` applied to each tensor (a move, a clone)."""
        operands = _map(self.operands, fn)
        sparse = None if self.sparse is None else SparseTerm(*map(fn, self.sparse))
        second = {name: fn(t) for name, t in self.second.items()}
        lowrank = None if self.lowrank is None else self.lowrank.map(fn)
        return KernelWeight(self.format, operands, sparse, second, lowrank)


@modes.outside()
@alone_after_fork
def to_kernel(qt: QuantTensor, layout: str) -> KernelWeight:
    """Converts to `layout`; the tensors may have any strides.

    Raises:
        ValueError: there is no such layout, or the format does not fit it; the columns of outliers are not ascending or
            not in the row; an integer scale is beyond the format's range.
    """
    target = find(layout)
    if not target.fits(qt.format):
        raise ValueError(f"format {qt.format.name!r} does not fit the layout {layout!r}")
    qt = qt.map(lambda t: strides.contiguous(modes.normal(t)))
    qt.check_columns()
    qt.check_integers()
    f, scales, scales2 = qt.format, qt.scales, None
    second: dict[str, Tensor] = {}
    if target.keeps_codes(f):
        scales = qt.tensors["scales"].view(CODE_DTYPES[f.scale or ""])
        scales2 = qt.scales2
        if f.scale == "dq8":
            scales2 = torch.cat([qt.tensors["scales2"], qt.tensors["scales2_offset"].view(1)])
    elif f.scale in ("dq8", "e4m3"):
        second = {k: t for k, t in qt.tensors.items() if k in _SECOND_LEVEL}
        scales = reference.effective_scales(qt)
    elif f.scale == "e8m0":
        # A power of two: exact in bf16.
        scales = e8m0_values(qt.tensors["scales"]).to(torch.bfloat16)
    table = target.fixed_table(f) if qt.table is None else target.pack_table(qt.table, f)
    operands = Operands(
        target.pack(qt.tensors["codes"], f, qt.shape[1]),
        None if scales is None else target.pack_scales(scales, f),
        None if qt.zeros is None else target.pack_zeros(qt.zeros, f),
        None if table is None else table.to(qt.device),
        _second_as(target.from_rows, scales2),
        _second_as(target.from_rows, qt.zeros2),
        f.matrix.spec,
        layout,
        *qt.shape,
    )
    sparse = None
    if qt.outlier_columns is not None and qt.outlier_values is not None:
        sparse = SparseTerm(qt.outlier_columns, qt.outlier_values)
    lowrank = None
    if f.rank:
        kept = f.factor_format
        given = (
            qt.factors
            if kept is None
            else [
                to_kernel(factor, factor_layout(layout, kept)).operands  # type: ignore[arg-type]
                for factor in qt.factors
            ]
        )
        lowrank = LowRankOperands(*given)  # type: ignore[arg-type]
    return KernelWeight(f, operands, sparse, second, lowrank)


def factor_layout(layout: str, format: Format) -> str:
    """How factors in a format lie, beside a matrix that lies in a layout: as it does, or canonically."""
    return layout if find(layout).fits(format) else CANONICAL


class LowRankPlan(NamedTuple):
    """What is known of a low-rank term without its tensors.

    Attributes:
        spec: of the factors' format, or None if they are dense.
        layouts: how factors lie, by the layout of the matrix.
        shapes: of L and R, by the names of `FACTORS`.
    """

    spec: str | None
    layouts: dict[str, str]
    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, format: Format, n: int, k: int) -> LowRankPlan | None:
        """That of an (n, k) weight; None if its format has no rank."""
        if not format.rank:
            return None
        shapes, kept = factor_shapes(format, n, k), format.factor_format
        if kept is None:
            return cls(None, {}, shapes)
        return cls(kept.spec, {layout: factor_layout(layout, kept) for layout in LAYOUTS}, shapes)

    def operands(self, layout: str, tensors: Mapping[str, Tensor]) -> LowRankOperands:
        """The term beside a matrix in `layout`; `tensors` are as in `low_rank_tensors`."""
        if self.spec is None:
            return LowRankOperands(*(tensors[name] for name in FACTORS))
        lies = self.layouts[layout]
        factors = []
        for name, (rows, columns) in self.shapes.items():
            codes, scales, zeros, table = (tensors[f"{name}_{key}"] for key in FACTOR_TENSORS)
            factors.append(
                Operands(codes, scales, zeros, table, None, None, self.spec, lies, rows, columns)
            )
        return LowRankOperands(*factors)


def low_rank_tensors(term: LowRankOperands) -> dict[str, Tensor | None]:
    """The tensors by name: of `FACTORS`, or with one of `FACTOR_TENSORS` behind it, None where there is none."""
    named: dict[str, Tensor | None] = {}
    for name, factor in zip(FACTORS, term, strict=True):
        if isinstance(factor, Operands):
            named |= {f"{name}_{key}": getattr(factor, key) for key in FACTOR_TENSORS}
        else:
            named[name] = factor
    return named


def to_operands(qt: QuantTensor, layout: str) -> Operands:
    """The operands of a weight that is nothing but a quantized matrix.

    Raises:
        ValueError: as `to_kernel`; or the format has other terms, which operands do not hold.
    """
    if more := qt.format.more_terms:
        raise ValueError(f"format {qt.format.name!r} has {more}, which operands do not hold")
    return to_kernel(qt, layout).operands


def _second_as(lay: Callable[[Tensor], Tensor], second: Tensor | None) -> Tensor | None:
    """`lay` of a second level per row; one number for the weight stays as it is."""
    return second if second is None or second.dim() == 1 else lay(second)


@modes.outside()
@alone_after_fork
def from_kernel(w: KernelWeight) -> QuantTensor:
    """Inverse of `to_kernel`, bit for bit."""
    n, k = w.shape
    f, layout = w.format, find(w.layout)
    codes, scales, zeros, table = canonical_tensors(w.operands)
    tensors = {**w.second, "codes": codes}
    for name, t in (("scales2", w.operands.scales2), ("zeros2", w.operands.zeros2)):
        if t is not None:
            tensors[name] = t if t.dim() == 1 else layout.to_rows(t, n)
    if f.scale == "dq8" and not w.second:
        tensors["scales2"], tensors["scales2_offset"] = factors_and_offset(tensors["scales2"])
    if scales is not None and not w.second:
        if layout.keeps_codes(f):
            scales = scales.view(SCALE_DTYPES[f.scale or ""])
        elif f.scale == "e8m0":
            # The exponent field of a bf16 power of two is the E8M0 code; 2^-127 is subnormal and gives 0.
            scales = (scales.contiguous().view(torch.int16) >> 7).to(SCALE_DTYPES["e8m0"])
        tensors["scales"] = scales
    if zeros is not None:
        tensors["zeros"] = zeros
    if table is not None:
        tensors["table"] = table
    if w.sparse is not None:
        tensors |= {"outlier_columns": w.sparse.columns, "outlier_values": w.sparse.values}
    if w.lowrank is not None:
        tensors |= _canonical_factors(w.lowrank)
    specs = tensor_specs(f, n, k)
    return QuantTensor(f, w.shape, {name: _compact(tensors[name]) for name in specs})


def factors_and_offset(second: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the second level of "dq8"."""
    return second[:-1], second[-1]


def _canonical_factors(term: LowRankOperands) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, factor in zip(FACTORS, term, strict=True):
        if isinstance(factor, Operands):
            qt = from_kernel(KernelWeight(factor.format, factor, None, {}))
            named |= {f"{name}_{key}": t for key, t in qt.tensors.items()}
        else:
            named[name] = factor
    return named


def _compact(t: Tensor) -> Tensor:
    """A tensor that fills its memory: files get all of that, and safetensors refuses a part of it."""
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


def canonical_tensors(op: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Codes, scales, zeros and table in canonical layout; scales and zeros without their second level."""
    (n, k), f, layout = op.shape, op.format, find(op.layout)
    return (
        layout.unpack(op.codes, f, n, k),
        None if op.scales is None else layout.unpack_scales(op.scales, f, n),
        None if op.zeros is None else layout.unpack_zeros(op.zeros, f, n),
        None if op.table is None or not f.fitted else layout.unpack_table(op.table, f, n),
    )


def chosen_tables(op: Operands, rows: Tensor | None = None) -> Tensor | None:
    """`reference.chosen_tables` of all rows, or of some in canonical layout."""
    if op.scales is None or op.format.table_scope != "pair":
        return None
    by_row = find(op.layout).to_rows(op.scales, op.n) if rows is None else op.scales[rows]
    return reference.chosen_tables(by_row, op.format)


def group_terms(op: Operands, rows: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zeros of all rows, or of some in canonical layout, (R, groups) fp32, the second level multiplied in:
    what `reference.apply_scales` takes. Differentiable in scales and zeros.
    """
    f, layout = op.format, find(op.layout)

    def of_rows(t: Tensor | None) -> Tensor | None:
        if t is None or t.dim() == 1:
            return t
        return layout.to_rows(t, op.n) if rows is None else t[rows]

    scales2, zeros2 = of_rows(op.scales2), of_rows(op.zeros2)
    scales, zeros = op.scales, op.zeros
    if scales is not None:
        scales = layout.unpack_scales(scales, f, op.n) if rows is None else scales[rows]
    if zeros is not None:
        zeros = layout.unpack_zeros(zeros, f, op.n) if rows is None else zeros[rows]
    if scales is not None:
        if f.scale == "dq8" and scales2 is not None:
            of_weight = factors_and_offset(scales2)
            scales = reference.of_double_quantization(scales, *of_weight, rows)
        else:
            if layout.keeps_codes(f):
                scales = reference.scale_values(scales, f)
            if scales2 is not None:
                scales = reference.of_two_levels(scales, scales2, f)
            scales = scales.float()
    if zeros is not None:
        zeros = zeros.float() if zeros2 is None else reference.of_two_levels(zeros, zeros2, f)
    return scales, zeros
