"""Hands FP8 matrices on the CPU to the compiled product. No maths and no checks; `isa` caps the instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import CODES
from lowbit.fp8.cpu import SCALE_TYPES, TYPES
from lowbit.fp8.granularity import Granularity
from lowbit.strides import address, address_of_rows


def scaled_mm(
    a: Tensor,  # (M, K), unit stride along K
    b: Tensor,  # (N, K), unit stride along K
    scale_a: Tensor,  # contiguous
    scale_b: Tensor,  # contiguous
    granularity_a: Granularity,
    granularity_b: Granularity,
    bias: Tensor | None,  # (N,) contiguous
    dtype: torch.dtype,
    isa: str = "",
) -> Tensor:  # (M, N) in `dtype`
    """`reference.scaled_mm` in fp32, rounded once to `dtype`."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=dtype, device="cpu")
    _C.fp8_matmul_ptr(
        m,
        n,
        k,
        _operand(a, scale_a, granularity_a),
        _operand(b, scale_b, granularity_b),
        address(bias),
        0 if bias is None else CODES[bias.dtype],
        address(out),
        CODES[dtype],
        torch.get_num_threads(),
        isa,
    )
    return out


def _operand(t: Tensor, scale: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """csrc/bindings_fp8_mm.cpp Operand: blocks of scales are powers of two, and shifts find them."""
    rows, columns = granularity.rows, granularity.columns
    return (
        *address_of_rows(t),
        TYPES[t.dtype],
        address(scale),
        SCALE_TYPES[scale.dtype],
        (rows or 1).bit_length() - 1,
        -1 if columns is None else columns.bit_length() - 1,
        0 if rows is None else scale.shape[1],
    )
