"""How many elements of a (R, K) matrix share a scale: blocks, the shape of the scales, and the way back from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.fp8.dtypes import E8M0, SCALE_DTYPES


@dataclass(frozen=True)
class Granularity:
    """Blocks of `rows` x `columns` elements; None for all of them. Blocks at the edges may be smaller."""

    name: str
    rows: int | None
    columns: int | None
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES  # the first is the default

    def scale_shape(self, rows: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of a (rows, k) matrix; () for one scale."""
        if self.rows is None:
            return ()
        return (-(-rows // self.rows), 1 if self.columns is None else -(-k // self.columns))

    def block(self, rows: int, k: int) -> tuple[int, int]:
        """Rows and columns of a block of a (rows, k) matrix, each at least 1."""
        return self.rows or max(rows, 1), self.columns or max(k, 1)


GRANULARITIES = {
    g.name: g
    for g in (
        Granularity("tensor", None, None),
        Granularity("row", 1, None),
        Granularity("1x16", 1, 16),
        Granularity("1x128", 1, 128),
        Granularity("128x128", 128, 128),
        Granularity("mx", 1, 32, (E8M0,)),
    )
}


def find(name: str) -> Granularity:
    """The granularity of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {list(GRANULARITIES)}, got {name!r}")
    return GRANULARITIES[name]


def infer(scale: Tensor, rows: int, k: int, name: str = "scale") -> Granularity:
    """The granularity of the scales of a (rows, k) matrix, from their shape and dtype.

    Shapes that fit several granularities, such as (R, 1) with K <= 16, mean the same blocks in all of them.

    Args:
        scale: fp32 or bf16; E8M0 for "mx" and only for it.
        rows, k: the matrix.
        name: what an error calls the scales.

    Raises:
        TypeError: the dtype is none of those.
        ValueError: the shape fits no granularity.
    """
    fitting = [g for g in GRANULARITIES.values() if scale.dtype in g.scale_dtypes]
    if not fitting:
        raise TypeError(f"{name} must be float32, bfloat16 or {E8M0} (mx), got {scale.dtype}")
    for g in fitting:
        if scale.shape == g.scale_shape(rows, k):
            return g
    expected = ", ".join(f"{g.scale_shape(rows, k)} ({g.name})" for g in fitting)
    raise ValueError(
        f"{name} of a ({rows}, {k}) matrix must have, in {scale.dtype}, one of the shapes {expected}, got "
        f"{tuple(scale.shape)}"
    )
