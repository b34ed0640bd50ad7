"""What the methods of structured formats share: scales, and codes of blocks of columns that make up for the error of
outputs that the blocks before them leave (BlockLDLQ of QuIP#, https://arxiv.org/abs/2402.04396, section 4.1).

With H = R R^T and U = R^-1 as in `gptq.py`, a block B of columns that is rounded to Q_B adds (W_B - Q_B) U_BB^-1 U_B
to the columns after it. Within a block the nearest codes are taken, as in the paper. Blocks go from the last column to
the first: a trellis is encoded in that direction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import packing, reference
from lowbit.formats import Format
from lowbit.methods import gptq, grid
from lowbit.methods.scales import store_scales
from lowbit.weights.quantized import QuantTensor

# The numbers (R, C) fp32 of columns, updated and scaled.
Take = Callable[[slice], Tensor]
# Chooses codes of a block and returns their values (R, block) fp32.
Encode = Callable[[Take, slice], Tensor]
_SLICE_WEIGHTS = 1 << 22


def check_codec(format: Format, codec: str, method: str) -> None:
    """Raises ValueError unless the format has the codec that a method makes codes for."""
    if format.codec != codec:
        raise ValueError(
            f"method {method!r} makes codes of codec {codec!r}, format {format.name!r} has {format.codec!r}"
        )


def start(weight: Tensor, format: Format, unit: float) -> QuantTensor:
    """A QuantTensor with which the root mean square of scaled weights is `unit`; codes are 0."""
    grid.check_weight(weight, format)
    qt = grid.empty(weight, format)
    if format.scale is not None:
        _, rms = grid.ranges(weight, format)
        store_scales(qt, rms / unit)
    return qt


def numbers(qt: QuantTensor, rows: slice, w: Tensor) -> Tensor:  # (R, K) fp32
    """Weights over their scales, 0 where the scale is 0."""
    scales = reference.effective_scales(qt)
    return grid.scaled(w, qt.format, None if scales is None else scales[rows])


def whole_vectors(values: Tensor, dim: int) -> Tensor:  # (R, C) -> (R, ceil(C / dim), dim)
    """Rows cut into vectors, the last one filled with zeros."""
    return F.pad(values, (0, -values.shape[1] % dim)).unflatten(1, (-1, dim))


def put(qt: QuantTensor, rows: slice, codes: Tensor) -> None:
    """Stores codes of some rows."""
    qt.tensors["codes"][rows] = packing.pack_codes(codes, qt.format).to(qt.device)


def refit_scales(qt: QuantTensor, weight: Tensor) -> None:
    """Gives each scale the value that leaves the least squared error with the codes at hand."""
    format = qt.format
    if format.scale is None:
        return
    scales = reference.effective_scales(qt)
    fitted = torch.empty(
        (qt.shape[0], format.num_groups(qt.shape[1])), dtype=torch.float64, device=qt.device
    )
    bare = QuantTensor(
        format, qt.shape, {**qt.tensors, "scales": torch.ones_like(qt.tensors["scales"])}
    )
    for rows, w in grid.slices(weight):
        values = reference.dequantize_rows(bare, rows, reference.effective_scales(bare))
        for_groups = []
        for v, part in zip(
            grid.group_parts(values, format), grid.group_parts(w, format), strict=True
        ):
            v, part = v.double(), part.double()
            square = (v * v).sum(-1)
            for_groups.append(torch.where(square > 0, (v * part).sum(-1) / square, 0.0))
        found = torch.cat(for_groups, 1)
        assert scales is not None
        # A negative one would be that of codes which say nothing of their weights.
        fitted[rows] = torch.where(found > 0, found, scales[rows].double())
    store_scales(qt, fitted)


def slices(weight: Tensor) -> list[slice]:
    """Slices of rows for the sweep over blocks."""
    n, k = weight.shape
    step = max(1, _SLICE_WEIGHTS // k)
    return [slice(begin, min(n, begin + step)) for begin in range(0, n, step)]


class Sweep:
    """The order of blocks, and what the error of a block adds to the columns that follow."""

    def __init__(self, hessian: Tensor, damping: float, weight: Tensor, block: int) -> None:
        gptq.check_hessian(hessian, weight)
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be finite and at least 0, got {damping}")
        k = weight.shape[1]
        self.k = k
        # The last column first.
        self.factor = gptq.inverse_factor(hessian.flip(0, 1), damping).flip(0, 1)
        self.blocks = [slice(b, min(k, b + block)) for b in range(0, k, block)][::-1]

    def run(self, qt: QuantTensor, rows: slice, weight: Tensor, encode: Encode) -> None:
        """Goes through the blocks of some rows; `encode` chooses and keeps codes."""
        scales = reference.effective_scales(qt)
        work = weight[rows].double().clone()
        own = torch.ones((1, 1), dtype=torch.float64, device=work.device)
        if scales is not None:
            own = reference.per_weight(scales[rows], qt.format, self.k).double()
        own = own.expand(work.shape)

        def take(columns: slice) -> Tensor:
            scale = own[:, columns]
            return torch.where(scale == 0, 0.0, work[:, columns] / scale).float()

        for block in self.blocks:
            lost = work[:, block] - encode(take, block).double() * own[:, block]
            if block.start > 0:
                weighted = torch.linalg.solve_triangular(
                    self.factor[block, block], lost, upper=False, left=False
                )
                work[:, : block.start] -= weighted @ self.factor[block, : block.start]
