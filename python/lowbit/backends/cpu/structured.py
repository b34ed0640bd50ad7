"""Structured weights on the CPU (csrc/cpu/structured/): few rows of x meet a row of the weight as it is decoded, many
meet slices of decoded rows in a dense product of torch. No checks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import _C, modes
from lowbit.backends.base import Backend
from lowbit.backends.cpu import sparse
from lowbit.backends.cpu.requests import CODES, of_bias, of_x
from lowbit.codebooks import grids, lattice
from lowbit.forking import alone_after_fork
from lowbit.formats import Format
from lowbit.layouts import Operands
from lowbit.strides import address
from lowbit.structured import BLOCK_BYTES
from lowbit.weights.sparse import SparseTerm

# csrc/cpu/structured/structured.h StructuredCodec
_CODECS = {
    codec: i
    for i, codec in enumerate(
        (
            "vector",
            "e8p",
            "trellis",
            "iq1_s",
            "iq1_m",
            "iq2_xxs",
            "iq2_xs",
            "iq2_s",
            "iq3_xxs",
            "iq3_s",
        )
    )
}
_MOST_ROWS = 8  # of x: structured.h kStructuredRows
# Weights that are decoded at a time for a dense product: 4 MiB of fp32.
_SLICE_WEIGHTS = 1 << 20


class StructuredBackend(Backend):
    """The kernels of the layout "rows"."""

    name = "structured"

    @alone_after_fork
    def linear(
        self, x: Tensor, w: Operands, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """By the kernel for up to 8 rows of x, else by dense products; fp32 products and sums, rounded once."""
        dtype = dtype or x.dtype
        if x.shape[0] <= _MOST_ROWS:
            return few_rows(x, w, bias, dtype)
        y = torch.empty((x.shape[0], w.n), dtype=dtype, device="cpu")
        rows, bias = x.float(), None if bias is None else bias.float()
        step = max(1, _SLICE_WEIGHTS // w.k)
        for begin in range(0, w.n, step):
            part = slice(begin, min(w.n, begin + step))
            index = torch.arange(part.start, part.stop, dtype=torch.int64, device="cpu")
            decoded = self.rows(index, w, torch.float32)
            y[:, part] = F.linear(rows, decoded, None if bias is None else bias[part])
        return y

    def rows(self, indices: Tensor | None, w: Operands, dtype: torch.dtype) -> Tensor:
        """Rows of the weight; only these are decoded."""
        return decode(indices, w, dtype)

    def describe(
        self, format: Format, n: int, k: int, m: int, x: torch.dtype, device: torch.device
    ) -> str:
        """What `explain` calls the kernel that `linear` runs."""
        op = "gemv" if m <= _MOST_ROWS else "panel"
        return f"{op}_{format.codec}_rows_{_C.structured_isa(_CODECS[format.codec])}"

    def sparse_linear(self, x: Tensor, term: SparseTerm) -> Tensor:
        """`sparse.sparse_linear`."""
        return sparse.sparse_linear(x, term)

    def sparse_name(self) -> str:
        """What `explain` calls `sparse_linear`."""
        return sparse.sparse_name()


STRUCTURED = StructuredBackend()


def few_rows(
    x: Tensor,  # (M, K), M at most 8, unit stride along K
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:  # (M, N)
    """x W^T + bias; `isa` caps the instruction set as LOWBIT_ISA does."""
    out = torch.empty((x.shape[0], w.n), dtype=dtype, device="cpu")
    _C.structured_linear(
        _weight(w),
        **of_x(x),
        **of_bias(bias),
        out=address(out),
        out_dtype=CODES[dtype],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def decode(
    indices: Tensor | None,  # (R,) int64 contiguous, each in [0, N)
    w: Operands,
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:  # (R, K)
    """Rows of the weight, or all of them, in fp32 and rounded once to `dtype`."""
    count = w.n if indices is None else indices.shape[0]
    out = torch.empty((count, w.k), dtype=dtype, device="cpu")
    _C.structured_rows(
        _weight(w),
        rows=0 if indices is None else address(indices),
        count=count,
        out=address(out),
        out_dtype=CODES[dtype],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def _weight(w: Operands) -> _C.StructuredWeight:
    """The tensors stay the caller's, which keeps them alive during the call."""
    format = w.format
    return _C.StructuredWeight(
        codec=_CODECS[format.codec],
        bits=format.bits,
        dim=format.dim,
        n=w.n,
        k=w.k,
        row_bytes=format.row_bytes(w.k),
        codes=address(w.codes),
        table=address(_levels(format.codec) if format.codec in BLOCK_BYTES else w.table),
        signs=address(_signs()) if format.codec == "e8p" else 0,
        grid=address(_grid(format.codec)) if format.codec in BLOCK_BYTES else 0,
        second=lattice.SECOND_STAGE.get(format.bits, 0.0),
        scales=address(w.scales),
        scale_dtype=0 if w.scales is None else CODES[w.scales.dtype],
        group=format.group or w.k,
    )


@functools.cache
@modes.outside()
def _signs() -> Tensor:  # (128, 8) fp32
    return torch.from_numpy(lattice.sign_patterns().copy())


@functools.cache
@modes.outside()
def _levels(codec: str) -> Tensor:  # (2, 8) fp32
    return torch.from_numpy(grids.levels(codec))


@functools.cache
@modes.outside()
def _grid(codec: str) -> Tensor:  # (E,) the 32 bits of `grids.words`
    return torch.from_numpy(grids.words(codec).view(np.int32))


def encode_trellis(
    numbers: Tensor,  # (R, K) fp32
    values: Tensor,  # (65536,) fp32: what the states stand for
    bits: int,
    next: Tensor | None = None,  # (R,) int32
    first: Tensor | None = None,  # (R,) int32
    isa: str = "",
) -> Tensor:  # (R, K) uint8
    """The codes whose values are nearest to the numbers of each row, which are a ring, or are followed by the state of
    low bits `next` and begin with that of low bits `first`, any where -1; all on the CPU.
    """
    codes = _C.encode_trellis(
        numbers.contiguous().numpy(),
        values.numpy(),
        bits,
        None if next is None else next.numpy(),
        None if first is None else first.numpy(),
        torch.get_num_threads(),
        isa,
    )
    return torch.from_numpy(codes)
