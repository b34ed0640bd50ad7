"""What the codes of structured formats stand for (`structured.py`), in plain torch. Sums of their parts are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.codebooks import lattice
from lowbit.formats import Format
from lowbit.reference.blocks import block_values
from lowbit.structured import BLOCK_BYTES, STATE_BITS

# A multiplicative step of 32 bits whose bytes look random (1MAD of QTIP, https://arxiv.org/abs/2406.11235): their sum
# is nearly normal, and a weight is this sum, less its mean, in units of 2^-7.
TRELLIS_FACTOR = 34038481
TRELLIS_ADDEND = 76625530
_BYTES_MEAN = 510


def trellis_values(states: Tensor) -> Tensor:  # fp32, the shape of `states`
    """The weight of each state, an integer below 2^16, with scale 1: multiples of 2^-7 in [-3.99, 3.99]."""
    word = (states.long() * TRELLIS_FACTOR + TRELLIS_ADDEND) & 0xFFFFFFFF
    sums = sum((word >> shift & 255 for shift in (0, 8, 16, 24)), torch.zeros_like(word))
    return (sums - _BYTES_MEAN).to(torch.float32) / 128


def trellis_states(codes: Tensor, bits: int) -> Tensor:  # (N, K) int64
    """The state of each weight of rows of codes: its code from the lowest bit up, then the codes that follow. The
    first code follows the last one (tail-biting), again and again in a row of few codes.
    """
    wide = codes.long()
    states = torch.zeros_like(wide)
    for step in range(-(-STATE_BITS // bits)):
        states |= wide.roll(-step, 1) << bits * step
    return states & (1 << STATE_BITS) - 1


def e8p_values(codes: Tensor, bits: int) -> Tensor:  # (..., 8) fp32
    """The point of each code of `codebooks.lattice`, of 16, 24 or 32 bits."""
    wide = codes.long() & 0xFFFFFFFF
    points = _e8p_points(wide & 0xFFFF)
    if bits == 16:
        return points
    rest = wide >> 16
    second = _e8p_points(rest) if bits == 32 else _rows(lattice.e8_points(), rest & 255)
    return points + second * lattice.SECOND_STAGE[bits]


def _e8p_points(codes: Tensor) -> Tensor:
    vectors = _rows(lattice.e8p_vectors(), codes & 255)
    signs = _rows(lattice.sign_patterns(), codes >> 8 & 127)
    return vectors * signs + ((codes >> 15).to(torch.float32) / 2 - 0.25).unsqueeze(-1)


def _rows(table: object, index: Tensor) -> Tensor:
    return torch.as_tensor(table, dtype=torch.float32, device=index.device)[index]


def structured_values(
    codes: Tensor,  # (N, ceil(K / dim)), or (N, ceil(K / dim), bytes), from `packing.unpack_codes`
    format: Format,
    table: Tensor | None,  # (2^bits, dim) fp32 of codec "vector"
) -> Tensor:  # (N, ceil(K / dim) * dim) fp32
    """What codes stand for with scale 1. Differentiable in the table."""
    if format.codec == "trellis":
        return trellis_values(trellis_states(codes, format.bits))
    if format.codec == "e8p":
        return e8p_values(codes, format.bits).flatten(1)
    if format.codec in BLOCK_BYTES:
        return block_values(codes, format.codec).flatten(1)
    assert table is not None
    return table[codes.long()].flatten(1)
