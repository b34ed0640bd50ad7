"""Sums of products of integers on a GPU's int8 units: `reference.exact_product` by torch._int_mm.

torch._int_mm of CUDA takes more than 16 rows, and a K and N that are multiples of 8; zeros fill up what is missing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROWS, _MULTIPLE = 24, 8
_SHIFT = 128  # of a table of 8-bit codes, which int8 does not hold


def product(
    q: Tensor,  # (M, K) int8, K at most `reference.activations.INT8_PART`
    table: Tensor,  # (entries,) fp32, integers in -128 .. 255
    shifted: bool,  # whether some are above 127
    codes: Tensor,  # (N, K) uint8
    zeros: Tensor | None,  # (N,) fp32, integers
) -> Tensor:  # (M, N) fp32
    """`reference.exact_product`: int32 sums hold every one, as they wrap around in between at most."""
    (m, k), n = q.shape, codes.shape[0]
    shift = _SHIFT if shifted else 0
    values = (table - shift).to(torch.int8)[codes.int()]
    down = max(_LEAST_ROWS, -(-m // _MULTIPLE) * _MULTIPLE) - m
    x = F.pad(q, (0, -k % _MULTIPLE, 0, down)).contiguous()
    w = F.pad(values, (0, -k % _MULTIPLE, 0, -n % _MULTIPLE)).contiguous()
    sums = torch._int_mm(x, w.t())[:m, :n]
    if shift or zeros is not None:
        added = shift if zeros is None else shift - zeros.to(torch.int32)
        sums = sums + q.sum(1, dtype=torch.int32)[:, None] * added
    return sums.float()
