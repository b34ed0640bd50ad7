"""How tensors must lie for the kernels: what brings them there, and the one place where addresses are taken.

A kernel gets an address and, for rows, their distance; it would read anything else wrong without a word. So `address`
and `address_of_rows` refuse what lies otherwise, and nothing else in the package calls `data_ptr` for a kernel.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, "Tensor | None")


def contiguous(t: T) -> T:
    """A tensor whose elements lie one after another, as `address` takes them."""
    return None if t is None else (t.resolve_neg() if t.is_neg() else t).contiguous()


def bytes_of(t: Tensor) -> Tensor:  # (B,) uint8
    """The bytes of the elements of a tensor one after another, on the CPU, as files hold them."""
    flat = contiguous(t.detach().cpu())
    # A contiguous tensor of at most one element has any strides, or none: it cannot be viewed in another dtype.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def rows_of(x: Tensor, width: int) -> Tensor:  # (M, width)
    """A tensor (..., width) as rows that `address_of_rows` takes."""
    x = x.resolve_neg() if x.is_neg() else x
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def address(t: Tensor | None) -> int:
    """The address of a contiguous tensor; 0 for None.

    Raises:
        ValueError: it is not contiguous.
    """
    if t is None:
        return 0
    if not t.is_contiguous() or t.is_neg():
        raise ValueError(f"a kernel takes contiguous tensors, got {_lies(t)}")
    return t.data_ptr()


def address_of_rows(t: Tensor | None) -> tuple[int, int]:
    """The address of (M, K) rows whose elements lie one after another, and the elements from one row to the next.

    Both are 0 for None.

    Raises:
        ValueError: the rows do not lie so.
    """
    if t is None:
        return 0, 0
    if t.dim() != 2 or t.is_neg() or (t.stride(1) != 1 and t.shape[1] > 1 and t.shape[0] > 0):
        raise ValueError(f"a kernel takes rows of unit stride, got {_lies(t)}")
    return t.data_ptr(), t.stride(0)


def _lies(t: Tensor) -> str:
    negative = " and the negative bit" if t.is_neg() else ""
    return f"shape {tuple(t.shape)} with strides {t.stride()}{negative}"


def shaped(y: Tensor, *shape: int) -> Tensor:
    """A contiguous result in another shape, and no view: what is returned to users may be written to in place."""
    return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)
