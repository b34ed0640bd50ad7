"""The block types of GGUF: how the bytes of a block split into codes, scales and minima of a Format.

Byte layouts of ggml-common.h. Scales of scales (Q2_K .. Q6_K, IQ4_XS) are kept apart from what
multiplies them; those of 4 and 6 bits take a byte each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType

from lowbit.formats import Format, as_format

Array = np.ndarray[Any, Any]


class Parts(NamedTuple):
    """Of B blocks: codes (B, weights) uint8; scales and minima (B, groups) and their second level
    (B, 1), in the dtypes of the format.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    scales2: Array | None = None
    zeros2: Array | None = None


@dataclass(frozen=True)
class BlockType:
    """How blocks (B, bytes) of a type split into the tensors of a format."""

    format: Format
    split: Callable[[Array], Parts]


def _half(b: Array, start: int) -> Array:  # (B, bytes) -> (B, 1)
    return np.ascontiguousarray(b[:, start : start + 2]).view(np.float16)


def _signed(b: Array) -> Array:
    return np.ascontiguousarray(b).view(np.int8)


def _nibbles(qs: Array) -> Array:  # (B, 16) -> (B, 32)
    """Codes of a ggml block: low nibbles are weights 0..15, high nibbles 16..31."""
    return np.concatenate((qs & 15, qs >> 4), axis=1)


def _fifth_bits(qh: Array) -> Array:  # (B, 4) -> (B, 32)
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _fields(data: Array, bits: int, run: int) -> Array:  # (B, bytes) -> (B, weights)
    """Of each `run` bytes the lowest fields of `bits` bits, then the next, to the highest."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(len(data), -1)


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


def _q2_k(b: Array) -> Parts:  # 16 scales and minima of 4 bits, 64 bytes of codes, d, dmin
    scales, minima = _signed(b[:, :16] & 15), _signed(b[:, :16] >> 4)
    return Parts(_fields(b[:, 16:80], 2, 32), scales, minima, _half(b, 80), -_half(b, 82))


def _q3_k(b: Array) -> Parts:  # 32 bytes of third bits, 64 of two, 16 scales of 6 bits, d
    s = b[:, 96:108]
    low = _fields(s[:, :8], 4, 8)
    scales = _signed(low | _fields(s[:, 8:], 2, 4) << 4) - np.int8(32)
    codes = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2
    return Parts(codes, scales, scales2=_half(b, 108))


def _scales_and_minima(s: Array) -> tuple[Array, Array]:  # (B, 12) -> (B, 8) each
    """6 bits each: four of both in the low bits of 8 bytes, whose high bits complete the other four
    of both.
    """
    scale, minimum, both = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate((scale & 63, both & 15 | scale >> 6 << 4), axis=1)
    minima = np.concatenate((minimum & 63, both >> 4 | minimum >> 6 << 4), axis=1)
    return _signed(scales), _signed(minima)


def _q4_k(b: Array) -> Parts:  # d, dmin, 12 bytes of scales and minima, 128 of codes
    codes = _fields(b[:, 16:144], 4, 32)
    return Parts(codes, *_scales_and_minima(b[:, 4:16]), _half(b, 0), -_half(b, 2))


def _q5_k(b: Array) -> Parts:  # as Q4_K, with 32 bytes of fifth bits before the codes
    codes = _fields(b[:, 48:176], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4
    return Parts(codes, *_scales_and_minima(b[:, 4:16]), _half(b, 0), -_half(b, 2))


def _q6_k(b: Array) -> Parts:  # 128 bytes of four bits, 64 of two, 16 int8 scales, d
    codes = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4
    return Parts(codes, _signed(b[:, 192:208]), scales2=_half(b, 208))


def _iq4_xs(b: Array) -> Parts:  # d, 8 scales: 2 high bits, then 4 low bits; 8 times 16 of nibbles
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    scales = _signed(low.astype(np.uint8) | high.astype(np.uint8) << 4) - np.int8(32)
    return Parts(_fields(b[:, 8:136], 4, 16), scales, scales2=_half(b, 0))


def _nvfp4(b: Array) -> Parts:  # 4 scales in E4M3 without a sign, 4 times 8 bytes of nibbles
    # 127 is 0 there; what has the sign set stands for itself without it.
    scales = np.where(b[:, :4] == 127, np.uint8(0), b[:, :4] & 127)
    return Parts(_fields(b[:, 4:], 4, 8), scales)


_T = GGMLQuantizationType
BLOCK_TYPES = {
    kind: BlockType(as_format(format), split)
    for kind, format, split in (
        (_T.Q4_0, "q4_0", lambda b: Parts(_nibbles(b[:, 2:]), _half(b, 0))),
        (_T.Q4_1, "q4_1", lambda b: Parts(_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2))),
        (_T.Q5_0, "q5_0", lambda b: Parts(_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _half(b, 0))),
        (_T.Q5_1, "q5_1", lambda b: Parts(
            _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2))),
        # Two's complement to offset binary.
        (_T.Q8_0, "q8_0", lambda b: Parts(b[:, 2:] ^ 0x80, _half(b, 0))),
        (_T.IQ4_NL, "iq4_nl", lambda b: Parts(_nibbles(b[:, 2:]), _half(b, 0))),
        (_T.TQ2_0, "tq2_0", lambda b: Parts(_fields(b[:, :64], 2, 32), _half(b, 64))),
        (_T.TQ1_0, "tq1_0", lambda b: Parts(_tq1_codes(b[:, :48], b[:, 48:52]), _half(b, 52))),
        (_T.MXFP4, "mxfp4", lambda b: Parts(_nibbles(b[:, 1:]), b[:, :1])),
        (_T.NVFP4, "nvfp4", _nvfp4),
        (_T.Q1_0, "binary", lambda b: Parts(_fields(b[:, 2:], 1, 1), _half(b, 0))),
        (_T.Q2_K, "q2_k", _q2_k),
        (_T.Q3_K, "q3_k", _q3_k),
        (_T.Q4_K, "q4_k", _q4_k),
        (_T.Q5_K, "q5_k", _q5_k),
        (_T.Q6_K, "q6_k", _q6_k),
        (_T.IQ4_XS, "iq4_xs", _iq4_xs),
    )
}  # fmt: skip
DENSE_TYPES = {_T.F32: torch.float32, _T.F16: torch.float16, _T.BF16: torch.bfloat16}
