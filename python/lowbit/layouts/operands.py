"""Operands: the tensors that an op takes, in a named layout, made from a QuantTensor and turned back into one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit import modes, reference, strides
from lowbit.forking import alone_after_fork
from lowbit.formats import Format
from lowbit.layouts.registry import find
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor, tensor_specs

# Canonical tensors that a two-level scale needs besides its fp32 product; `Operands.second` keeps them.
_SECOND_LEVEL = ("scales", "scales2", "scales2_offset")


@dataclass(frozen=True)
class Operands:
    """What an op reads. `second` holds canonical scales that cannot be recovered from the products."""

    format: Format
    shape: tuple[int, int]
    layout: str
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    table: Tensor | None
    second: dict[str, Tensor]
    outlier_columns: Tensor | None = None
    outlier_values: Tensor | None = None
    # Of the format, with and without outliers, kept: making one takes longer than a small product.
    spec: str = field(init=False, repr=False)
    spec_without_outliers: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.format.spec)
        object.__setattr__(self, "spec_without_outliers", self.format.without_outliers.spec)


@modes.outside()
@alone_after_fork
def to_operands(qt: QuantTensor, layout: str) -> Operands:
    """Converts to `layout`; the tensors may have any strides.

    Raises:
        ValueError: there is no such layout, or the format does not fit it; the columns of outliers are not ascending or
            not in the row.
    """
    target = find(layout)
    if not target.fits(qt.format):
        raise ValueError(f"format {qt.format.name!r} does not fit the layout {layout!r}")
    qt = qt.map(lambda t: strides.contiguous(modes.normal(t)))
    qt.check_columns()
    f, scales = qt.format, qt.scales
    second: dict[str, Tensor] = {}
    if f.scale in ("dq8", "e4m3"):
        second = {k: t for k, t in qt.tensors.items() if k in _SECOND_LEVEL}
        scales = reference.effective_scales(qt)
    elif f.scale == "e8m0":
        # A power of two: exact in bf16.
        scales = reference.e8m0_values(qt.tensors["scales"]).to(torch.bfloat16)
    table = target.fixed_table(f) if qt.table is None else target.pack_table(qt.table, f)
    return Operands(
        f,
        qt.shape,
        layout,
        target.pack(qt.tensors["codes"], f, qt.shape[1]),
        None if scales is None else target.from_rows(scales),
        None if qt.zeros is None else target.pack_zeros(qt.zeros, f),
        None if table is None else table.to(qt.device),
        second,
        qt.outlier_columns,
        qt.outlier_values,
    )


@modes.outside()
@alone_after_fork
def from_operands(op: Operands) -> QuantTensor:
    """Inverse of `to_operands`, bit for bit."""
    n, k = op.shape
    f = op.format
    codes, scales, zeros, table = canonical_tensors(op)
    tensors = {**op.second, "codes": codes}
    if scales is not None and not op.second:
        if f.scale == "e8m0":
            # The exponent field of a bf16 power of two is the E8M0 code; 2^-127 is subnormal and gives 0.
            scales = (scales.contiguous().view(torch.int16) >> 7).to(SCALE_DTYPES["e8m0"])
        tensors["scales"] = scales
    if zeros is not None:
        tensors["zeros"] = zeros
    if table is not None:
        tensors["table"] = table
    if op.outlier_columns is not None and op.outlier_values is not None:
        tensors |= {"outlier_columns": op.outlier_columns, "outlier_values": op.outlier_values}
    specs = tensor_specs(f, n, k)
    return QuantTensor(f, op.shape, {name: _compact(tensors[name]) for name in specs})


def _compact(t: Tensor) -> Tensor:
    """A tensor that fills its memory: files get all of that, and safetensors refuses a part of it."""
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


def canonical_tensors(op: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Codes, scales, zeros and table in canonical layout."""
    (n, k), f, layout = op.shape, op.format, find(op.layout)
    return (
        layout.unpack(op.codes, f, n, k),
        None if op.scales is None else layout.to_rows(op.scales, n),
        None if op.zeros is None else layout.unpack_zeros(op.zeros, f, n),
        None if op.table is None or not f.fitted else layout.unpack_table(op.table, f, n),
    )
