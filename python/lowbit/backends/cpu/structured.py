"""Structured weights on the CPU (csrc/cpu/structured/). No checks."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C


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
