"""The block types of GGUF: how the bytes of a block split into codes, scales and minima of a Format, and join again.

Byte layouts of ggml-common.h. Scales of scales (Q2_K .. Q6_K, IQ4_XS) are kept apart from what
multiplies them; those of 4 and 6 bits take a byte each. Blocks of vectors (IQ1_S .. IQ3_S) stay whole: a
block is a code of its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType

from lowbit.formats import Format, as_format
from lowbit.structured import BLOCK_BYTES

Array = np.ndarray[Any, Any]


class Parts(NamedTuple):
    """Of B blocks: codes (B, weights) uint8, or (B, bytes) of blocks that stay whole; scales and minima (B, groups) and
    their second level (B, 1), in the dtypes of the format.
    """

    codes: Array
    scales: Array | None = None
    zeros: Array | None = None
    scales2: Array | None = None
    zeros2: Array | None = None


@dataclass(frozen=True)
class BlockType:
    """How blocks (B, bytes) of a type split into the tensors of a format, and are made of them.

    `join` raises ValueError where scales or minima are none that a block can hold.
    """

    format: Format
    split: Callable[[Array], Parts]
    join: Callable[[Parts], Array]


def _half(b: Array, start: int) -> Array:  # (B, bytes) -> (B, 1)
    return np.ascontiguousarray(b[:, start : start + 2]).view(np.float16)


def _signed(b: Array) -> Array:
    return np.ascontiguousarray(b).view(np.int8)


def _bytes(*fields: Array | None) -> Array:
    """The bytes of one field after the other, (B, bytes)."""
    there = [np.ascontiguousarray(f) for f in fields if f is not None]
    return np.concatenate([f.view(np.uint8).reshape(len(f), -1) for f in there], axis=1)


def _within(values: Array | None, low: int, high: int, what: str = "scales") -> Array:
    """The values as bytes, if they are in [low, high]."""
    assert values is not None
    if (
        values.size
        and not low <= (least := int(values.min())) <= (most := int(values.max())) <= high
    ):
        found = least if least < low else most
        raise ValueError(f"the integers of {what} must be in [{low}, {high}], got {found}")
    return values.view(np.uint8)


def _nibbles(qs: Array) -> Array:  # (B, 16) -> (B, 32)
    """Codes of a ggml block: low nibbles are weights 0..15, high nibbles 16..31."""
    return np.concatenate((qs & 15, qs >> 4), axis=1)


def _join_nibbles(codes: Array) -> Array:  # (B, 32) -> (B, 16)
    return codes[:, :16] & 15 | codes[:, 16:] << 4


def _fifth_bits(qh: Array) -> Array:  # (B, 4) -> (B, 32)
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _join_fifth_bits(codes: Array) -> Array:  # (B, 32) -> (B, 4)
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _fields(data: Array, bits: int, run: int) -> Array:  # (B, bytes) -> (B, weights)
    """Of each `run` bytes the lowest fields of `bits` bits, then the next, to the highest."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(len(data), -1)


def _join_fields(codes: Array, bits: int, run: int) -> Array:  # (B, weights) -> (B, bytes)
    """Inverse of `_fields`; higher bits of a code do not count."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = codes.reshape(len(codes), -1, 8 // bits, run) & np.uint8(2**bits - 1)
    joined: Array = np.bitwise_or.reduce(fields << shifts, axis=2)
    return joined.reshape(len(codes), -1)


def _tq1_codes(qs: Array, qh: Array) -> Array:  # (B, 48), (B, 4) -> (B, 256)
    """Trits by their place: of 32 bytes, of the next 16, and four of the last 4. A byte is the
    fraction of its number of trits, so that the top one is an integer part.
    """
    runs = [(qs[:, :32], 5), (qs[:, 32:], 5), (qh, 4)]
    return np.concatenate(
        [
            ((d * np.uint8(3**i)).astype(np.uint16) * 3 >> 8).astype(np.uint8)
            for d, count in runs
            for i in range(count)
        ],
        axis=1,
    )


def _join_tq1(p: Parts) -> Array:
    out, start = [], 0
    for width, count in ((32, 5), (16, 5), (4, 4)):
        trits = p.codes[:, start : start + width * count].reshape(len(p.codes), count, width)
        powers = 3 ** np.arange(4, 4 - count, -1, dtype=np.uint16).reshape(1, -1, 1)
        digits = (trits * powers).sum(axis=1, dtype=np.uint16)
        # The smallest byte whose fraction of 256 is no less.
        out.append(((digits.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
        start += width * count
    return _bytes(*out, p.scales)


def _q2_k(b: Array) -> Parts:  # 16 scales and minima of 4 bits, 64 bytes of codes, d, dmin
    scales, minima = _signed(b[:, :16] & 15), _signed(b[:, :16] >> 4)
    return Parts(_fields(b[:, 16:80], 2, 32), scales, minima, _half(b, 80), -_half(b, 82))


def _join_q2_k(p: Parts) -> Array:
    minima = _within(p.zeros, 0, 15, "minima")
    both = _within(p.scales, 0, 15) | minima << 4
    return _bytes(both, _join_fields(p.codes, 2, 32), p.scales2, _negated(p.zeros2))


def _negated(minima: Array | None) -> Array:
    assert minima is not None
    return -minima


def _q3_k(b: Array) -> Parts:  # 32 bytes of third bits, 64 of two, 16 scales of 6 bits, d
    s = b[:, 96:108]
    low = _fields(s[:, :8], 4, 8)
    scales = _signed(low | _fields(s[:, 8:], 2, 4) << 4) - np.int8(32)
    codes = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2
    return Parts(codes, scales, scales2=_half(b, 108))


def _join_q3_k(p: Parts) -> Array:
    scales = _within(p.scales, -32, 31) + np.uint8(32)
    low, high = _join_fields(scales, 4, 8), _join_fields(scales >> 4, 2, 4)
    codes = _join_fields(p.codes >> 2, 1, 32), _join_fields(p.codes, 2, 32)
    return _bytes(*codes, low, high, p.scales2)


def _scales_and_minima(s: Array) -> tuple[Array, Array]:  # (B, 12) -> (B, 8) each
    """6 bits each: four of both in the low bits of 8 bytes, whose high bits complete the other four
    of both.
    """
    scale, minimum, both = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate((scale & 63, both & 15 | scale >> 6 << 4), axis=1)
    minima = np.concatenate((minimum & 63, both >> 4 | minimum >> 6 << 4), axis=1)
    return _signed(scales), _signed(minima)


def _join_scales_and_minima(p: Parts) -> Array:  # (B, 8) each -> (B, 12)
    scales, minima = _within(p.scales, 0, 63), _within(p.zeros, 0, 63, "minima")
    scale = scales[:, :4] | scales[:, 4:] >> 4 << 6
    minimum = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.concatenate((scale, minimum, scales[:, 4:] & 15 | minima[:, 4:] << 4), axis=1)


def _q4_k(b: Array) -> Parts:  # d, dmin, 12 bytes of scales and minima, 128 of codes
    codes = _fields(b[:, 16:144], 4, 32)
    return Parts(codes, *_scales_and_minima(b[:, 4:16]), _half(b, 0), -_half(b, 2))


def _join_q4_k(p: Parts) -> Array:
    codes = _join_fields(p.codes, 4, 32)
    return _bytes(p.scales2, _negated(p.zeros2), _join_scales_and_minima(p), codes)


def _q5_k(b: Array) -> Parts:  # as Q4_K, with 32 bytes of fifth bits before the codes
    codes = _fields(b[:, 48:176], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4
    return Parts(codes, *_scales_and_minima(b[:, 4:16]), _half(b, 0), -_half(b, 2))


def _join_q5_k(p: Parts) -> Array:
    codes = _join_fields(p.codes >> 4, 1, 32), _join_fields(p.codes, 4, 32)
    return _bytes(p.scales2, _negated(p.zeros2), _join_scales_and_minima(p), *codes)


def _q6_k(b: Array) -> Parts:  # 128 bytes of four bits, 64 of two, 16 int8 scales, d
    codes = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4
    return Parts(codes, _signed(b[:, 192:208]), scales2=_half(b, 208))


def _join_q6_k(p: Parts) -> Array:
    codes = _join_fields(p.codes, 4, 64), _join_fields(p.codes >> 4, 2, 32)
    return _bytes(*codes, p.scales, p.scales2)


def _iq4_xs(b: Array) -> Parts:  # d, 8 scales: 2 high bits, then 4 low bits; 8 times 16 of nibbles
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    scales = _signed(low.astype(np.uint8) | high.astype(np.uint8) << 4) - np.int8(32)
    return Parts(_fields(b[:, 8:136], 4, 16), scales, scales2=_half(b, 0))


def _join_iq4_xs(p: Parts) -> Array:
    scales = _within(p.scales, -32, 31) + np.uint8(32)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = np.bitwise_or.reduce((scales >> 4).astype(np.uint16) << shifts, axis=1, keepdims=True)
    low = scales[:, 0::2] & 15 | scales[:, 1::2] << 4
    return _bytes(p.scales2, high.astype("<u2"), low, _join_fields(p.codes, 4, 16))


def _nvfp4(b: Array) -> Parts:  # 4 scales in E4M3 without a sign, 4 times 8 bytes of nibbles
    # 127 is 0 there; what has the sign set stands for itself without it.
    scales = np.where(b[:, :4] == 127, np.uint8(0), b[:, :4] & 127)
    return Parts(_fields(b[:, 4:], 4, 8), scales)


def _join_nvfp4(p: Parts) -> Array:
    assert p.scales is not None
    scales = _within(p.scales.view(np.uint8), 0, 126)
    return _bytes(scales, _join_fields(p.codes, 4, 8))


def _join_plain(p: Parts) -> Array:  # Q4_0, Q4_1, IQ4_NL, MXFP4
    return _bytes(p.scales, p.zeros, _join_nibbles(p.codes))


def _join_five(p: Parts) -> Array:  # Q5_0, Q5_1
    return _bytes(p.scales, p.zeros, _join_fifth_bits(p.codes), _join_nibbles(p.codes))


def _whole(b: Array) -> Parts:
    return Parts(b)


def _join_whole(p: Parts) -> Array:
    return p.codes


_T = GGMLQuantizationType
BLOCK_TYPES = {
    kind: BlockType(as_format(format), split, join)
    for kind, format, split, join in (
        (_T.Q4_0, "q4_0", lambda b: Parts(_nibbles(b[:, 2:]), _half(b, 0)), _join_plain),
        (_T.Q4_1, "q4_1", lambda b: Parts(_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)), _join_plain),
        (_T.Q5_0, "q5_0", lambda b: Parts(_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _half(b, 0)), _join_five),
        (_T.Q5_1, "q5_1", lambda b: Parts(
            _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2)), _join_five),
        # Two's complement to offset binary.
        (_T.Q8_0, "q8_0", lambda b: Parts(b[:, 2:] ^ 0x80, _half(b, 0)),
         lambda p: _bytes(p.scales, p.codes ^ 0x80)),
        (_T.IQ4_NL, "iq4_nl", lambda b: Parts(_nibbles(b[:, 2:]), _half(b, 0)), _join_plain),
        (_T.TQ2_0, "tq2_0", lambda b: Parts(_fields(b[:, :64], 2, 32), _half(b, 64)),
         lambda p: _bytes(_join_fields(p.codes, 2, 32), p.scales)),
        (_T.TQ1_0, "tq1_0", lambda b: Parts(_tq1_codes(b[:, :48], b[:, 48:52]), _half(b, 52)), _join_tq1),
        (_T.MXFP4, "mxfp4", lambda b: Parts(_nibbles(b[:, 1:]), b[:, :1]), _join_plain),
        (_T.NVFP4, "nvfp4", _nvfp4, _join_nvfp4),
        (_T.Q1_0, "binary", lambda b: Parts(_fields(b[:, 2:], 1, 1), _half(b, 0)),
         lambda p: _bytes(p.scales, _join_fields(p.codes, 1, 1))),
        (_T.Q2_K, "q2_k", _q2_k, _join_q2_k),
        (_T.Q3_K, "q3_k", _q3_k, _join_q3_k),
        (_T.Q4_K, "q4_k", _q4_k, _join_q4_k),
        (_T.Q5_K, "q5_k", _q5_k, _join_q5_k),
        (_T.Q6_K, "q6_k", _q6_k, _join_q6_k),
        (_T.IQ4_XS, "iq4_xs", _iq4_xs, _join_iq4_xs),
        *((GGMLQuantizationType[codec.upper()], codec, _whole, _join_whole) for codec in BLOCK_BYTES),
    )
}  # fmt: skip
DENSE_TYPES = {_T.F32: torch.float32, _T.F16: torch.float16, _T.BF16: torch.bfloat16}
