"""What GGUF's blocks of 256 weights IQ1_S to IQ3_S stand for (ggml-common.h), in plain torch: every product is exact.

A weight is scale * value, or scale * (value +- 1/8) for IQ1: the value one of a vector of `codebooks/grids.py` with its
sign, the scale a small integer, or 1/8 to 31/8 in steps of 1/4, times an fp16 number of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import packing
from lowbit.codebooks import grids
from lowbit.packing import little_endian
from lowbit.structured import BLOCK_WEIGHTS


class Fields(NamedTuple):
    """Of blocks (..., bytes): `numbers` (..., C) of vectors, `flips` (..., 32) of a byte each, the bits of 8 weights'
    signs, or 255 where 1/8 is taken away; `scales` (..., S) fp32 of equal runs of weights, without the block's own.
    """

    numbers: Tensor
    flips: Tensor
    scales: Tensor


def block_values(blocks: Tensor, codec: str) -> Tensor:  # (..., bytes) uint8 -> (..., 256) fp32
    """The weights of blocks.

    Example:
        >>> block_values(torch.zeros(3, 66, dtype=torch.uint8), "iq2_xxs").shape
        torch.Size([3, 256])
    """
    f = _FIELDS[codec](blocks.long())
    table = torch.as_tensor(grids.vectors(codec), dtype=torch.float32, device=blocks.device)
    values = table[f.numbers].flatten(-2)
    set_bits = _bits(f.flips.unsqueeze(-1), range(8)).flatten(-2) == 1
    if grids.has_delta(codec):
        values = values + torch.where(set_bits, -grids.DELTA, grids.DELTA)
    else:
        values = torch.where(set_bits, -values, values)
    scales = f.scales * packing.block_scales(blocks, codec).unsqueeze(-1)
    return values * scales.repeat_interleave(BLOCK_WEIGHTS // f.scales.shape[-1], -1)


def _bits(b: Tensor, shifts: range, mask: int = 1) -> Tensor:  # (..., 1) -> (..., len(shifts))
    return b >> torch.tensor(shifts, dtype=torch.int64, device=b.device) & mask


def _each(b: Tensor, shifts: range, mask: int) -> Tensor:  # (..., B) -> (..., B * len(shifts))
    """Fields of every byte or word, from the first shift on."""
    return _bits(b.unsqueeze(-1), shifts, mask).flatten(-2)


def _with_parity(seven: Tensor) -> Tensor:
    """The sign bits of 8 values by those of 7: an even number of them."""
    odd = seven ^ seven >> 4
    odd = odd ^ odd >> 2
    return seven | (odd ^ odd >> 1) << 7 & 128


def _half_steps(integers: Tensor, unit: float) -> Tensor:
    return (integers.to(torch.float32) + 0.5) * unit


def _odd(integers: Tensor) -> Tensor:
    return (2 * integers + 1).to(torch.float32)


def _signs_and_scales(b: Tensor) -> tuple[Tensor, Tensor]:  # (..., 32) -> (..., 32), (..., 8)
    """Of 8 numbers of 32 bits: four times 7 bits, then 4 bits."""
    words = little_endian(b)
    both = words[..., 0::2] | words[..., 1::2] << 16
    return _with_parity(_each(both, range(0, 28, 7), 127)), both >> 28


def _iq2_xxs(b: Tensor) -> Fields:  # d, 8 times: 4 numbers, signs and scale of 32 weights
    runs = b[..., 2:66].unflatten(-1, (8, 8))
    signs, scales = _signs_and_scales(runs[..., 4:].flatten(-2))
    return Fields(runs[..., :4].flatten(-2), signs, _half_steps(scales, 0.25))


def _iq2_xs(
    b: Tensor,
) -> Fields:  # d, 32 times 9 bits of a number and 7 of signs, 8 bytes of scales
    words = little_endian(b[..., 2:66])
    scales = _each(b[..., 66:74], range(0, 8, 4), 15)
    return Fields(words & 511, _with_parity(words >> 9), _half_steps(scales, 0.25))


def _iq2_s(
    b: Tensor,
) -> Fields:  # d, 32 numbers, 32 bytes of signs, 8 of high bits of numbers, 8 of scales
    numbers = b[..., 2:34] | _each(b[..., 66:74], range(0, 8, 2), 3) << 8
    scales = _each(b[..., 74:82], range(0, 8, 4), 15)
    return Fields(numbers, b[..., 34:66], _half_steps(scales, 0.25))


def _iq3_xxs(b: Tensor) -> Fields:  # d, 64 numbers, 8 times signs and scale of 32 weights
    signs, scales = _signs_and_scales(b[..., 66:98])
    return Fields(b[..., 2:66], signs, _half_steps(scales, 0.5))


def _iq3_s(
    b: Tensor,
) -> Fields:  # d, 64 numbers, 8 bytes of their high bits, 32 of signs, 4 of scales
    numbers = b[..., 2:66] | _each(b[..., 66:74], range(8), 1) << 8
    scales = _each(b[..., 106:110], range(0, 8, 4), 15)
    return Fields(numbers, b[..., 74:106], _odd(scales))


def _iq1_s(
    b: Tensor,
) -> Fields:  # d, 32 numbers, 8 words of their high bits, scale and the sign of 1/8
    words = little_endian(b[..., 34:50])
    numbers = b[..., 2:34] | _each(words, range(0, 12, 3), 7) << 8
    flips = (words >> 15).repeat_interleave(4, -1) * 255
    return Fields(numbers, flips, _odd(words >> 12 & 7))


def _iq1_m(b: Tensor) -> Fields:
    """32 numbers, 32 nibbles of their high bits and the sign of 1/8, 4 words of 4 scales and a nibble of d."""
    high, words = _each(b[..., 32:48], range(0, 8, 4), 15), little_endian(b[..., 48:56])
    numbers = b[..., :32] | (high & 7) << 8
    return Fields(numbers, (high >> 3) * 255, _odd(_each(words, range(0, 12, 3), 7)))


_FIELDS: dict[str, Callable[[Tensor], Fields]] = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}
