"""The kernels of the sparse term and of pruned weights on the CPU. No maths and no checks, as in `weights.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import CODES
from lowbit.layouts import PrunedOperands
from lowbit.strides import address, address_of_rows
from lowbit.weights.sparse import SparseTerm


def sparse_linear(
    x: Tensor,  # (M, K), unit stride along K
    term: SparseTerm,  # contiguous
    isa: str = "",
) -> Tensor:  # (M, N) fp32
    """`reference.outlier_product` of x in fp32; `isa` caps the instruction set as LOWBIT_ISA does."""
    columns, values = term
    (m, k), (n, count) = x.shape, columns.shape
    out = torch.empty((m, n), dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.multiply_outliers_ptr(
        x=x_address,
        x_dtype=CODES[x.dtype],
        m=m,
        k=k,
        x_stride=x_stride,
        columns=address(columns),
        values=address(values),
        value_dtype=CODES[values.dtype],
        n=n,
        count=count,
        out=address(out),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def sparse_name() -> str:
    """What `explain` calls `sparse_linear`."""
    return f"outliers_{_C.outliers_isa()}"


def pruned_linear(
    x: Tensor,  # (M, K), unit stride along K
    w: PrunedOperands,  # contiguous
    isa: str = "",
) -> Tensor:  # (M, N) fp32
    """`reference.pruned_product` of x in fp32; `isa` caps the instruction set as LOWBIT_ISA does. ValueError if the
    starts of `w` are not those of its entries.
    """
    m, k = x.shape
    out = torch.empty((m, w.n), dtype=torch.float32, device="cpu")
    x_address, x_stride = address_of_rows(x)
    _C.multiply_pruned_ptr(
        x=x_address,
        x_dtype=CODES[x.dtype],
        m=m,
        k=k,
        x_stride=x_stride,
        entries=address(w.entries),
        steps=len(w.entries),
        starts=address(w.starts),
        table=address(w.table),
        bits=len(w.table).bit_length() - 1,
        n=w.n,
        out=address(out),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def pruned_name() -> str:
    """What `explain` calls `pruned_linear`."""
    return f"pruned_{_C.pruned_isa()}"
