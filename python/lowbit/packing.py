"""Canonical packing: the one portable layout of codes, in plain torch. Files hold nothing else.

Bits. Row n of an (N, K) code matrix is a little-endian bit stream: code k occupies bits [k*b, (k+1)*b) of the
row, least significant bit first; bit i of the stream is bit i % 8 of byte i // 8. Every row starts on a byte, so
a row takes ceil(K * b / 8) bytes; the unused high bits of its last byte are zero. Eight codes fill b bytes.

Digits of base B. As many codes as fit a byte, d with B^d <= 256, make the byte c0 + B*c1 + B^2*c2 + ...: five of
base 3 (0..242), three of base 5 or 6; a row takes ceil(K / d) bytes, the missing digits of its last byte are zero.

A code of `dim` weights takes the place of theirs: ceil(K / dim) of up to 32 bits, or of whole blocks of bytes. Kernels
read `layouts/`, made of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.codebooks.tables import digits_per_byte
from lowbit.formats import Format
from lowbit.structured import BLOCK_BYTES

# Rows are packed in slices of about this many codes, which bounds the temporaries to 16 MiB.
_SLICE_CODES = 1 << 22


def pack_codes(
    codes: Tensor,  # (N, C) uint8, or int64 with more than 8 bits, or (N, C, bytes) uint8; C is K, or ceil(K / dim)
    format: Format,
) -> Tensor:  # (N, format.row_bytes(K)) uint8
    """Packs codes into the canonical layout.

    Raises:
        ValueError: a code does not fit the format.
    """
    _check_codes(codes, format)
    if is_blocks(format):
        return codes.reshape(len(codes), -1)
    n, k = codes.shape[0], codes.shape[1] * format.dim
    out = torch.empty((n, format.row_bytes(k)), dtype=torch.uint8, device=codes.device)
    for rows in _row_slices(n, k):
        out[rows] = _pack_slice(codes[rows], format)
    return out


def unpack_codes(
    packed: Tensor,  # (N, format.row_bytes(K)) uint8
    format: Format,
    k: int,
) -> Tensor:  # (N, C) uint8, or int64 with more than 8 bits, or (N, C, bytes) uint8 of blocks
    """Inverse of `pack_codes`."""
    n = packed.shape[0]
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (n, format.row_bytes(k)):
        raise ValueError(
            f"packed must be uint8 of shape ({n}, {format.row_bytes(k)}) for K = {k} in format "
            f"{format.name!r}, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if is_blocks(format):
        return packed.reshape(n, format.num_vectors(k), format.bits // 8)
    dtype = _code_dtype(format)
    out = torch.empty((n, format.num_vectors(k)), dtype=dtype, device=packed.device)
    for rows in _row_slices(n, k):
        out[rows] = _unpack_slice(packed[rows], format, k)
    return out


# Bits of integer scales of less than a byte.
_SCALE_BITS = {"uint4": 4, "uint6": 6, "int6": 6}


def scale_bits(format: Format) -> int:
    """Bits of the integer scales of a format, and of zeros that are such, where they are packed; 0 if they fill bytes
    or the format has none.
    """
    return _SCALE_BITS.get(format.scale or "", 0)


def pack_scales(
    scales: Tensor,  # (..., C) int8
    bits: int,  # 4 or 6
) -> Tensor:  # (..., C * bits / 8) uint8, C rounded up to a multiple of 4
    """The low bits of integers as a little-endian bit stream, with zeros up to a multiple of 4."""
    codes = F.pad(scales.view(torch.uint8), (0, -scales.shape[-1] % 4))
    if bits == 4:
        return codes[..., 0::2] & 15 | codes[..., 1::2] << 4
    a, b, c, d = (codes & 63).unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), -1).flatten(-2)


def unpack_scales(packed: Tensor, bits: int, signed: bool) -> Tensor:
    """Inverse of `pack_scales`; what was added is still there."""
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    else:
        a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
        fields = a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2
        codes = torch.stack(fields, -1).flatten(-2)
    codes = codes.view(torch.int8)
    unused = 8 - bits
    return codes << unused >> unused if signed else codes


def check_padding_and_range(packed: Tensor, format: Format, k: int) -> None:
    """Raises ValueError if canonical bytes hold a code that the format does not have."""
    most = format.base or 2**format.bits
    top = most ** digits_per_byte(most) - 1 if format.base else 255
    highest = None
    if packed.numel() and int(packed.max()) > top:
        highest = f"a byte above {top}"
    elif format.num_codes < most and any(
        bool((_unpack_slice(packed[rows], format, k) >= format.num_codes).any())
        for rows in _row_slices(packed.shape[0], k)
    ):
        highest = f"a code above {format.num_codes - 1}"
    if highest:
        raise ValueError(f"codes of format {format.name!r} hold {highest}: the data is damaged")
    if is_blocks(format):
        scales = block_scales(unpack_codes(packed, format, k), format.codec)
        if not bool(scales.isfinite().all()):
            raise ValueError(
                f"codes of format {format.name!r} hold NaN or inf as the scale of a block"
            )


def _check_codes(codes: Tensor, format: Format) -> None:
    dtype = _code_dtype(format)
    if is_blocks(format):
        if codes.dtype != dtype or codes.dim() != 3 or codes.shape[2] != format.bits // 8:
            raise ValueError(
                f"codes must be a uint8 tensor of shape (N, C, {format.bits // 8}) for format {format.name!r}, got "
                f"{codes.dtype} of shape {tuple(codes.shape)}"
            )
        return
    if codes.dtype != dtype or codes.dim() != 2:
        raise ValueError(
            f"codes must be a 2-D {str(dtype)[6:]} tensor, got {codes.dtype} of shape {tuple(codes.shape)}"
        )
    if not codes.numel():
        return
    lowest, highest = (int(bound) for bound in codes.aminmax())
    if lowest < 0 or highest >= format.num_codes:
        raise ValueError(
            f"codes must be below {format.num_codes} for format {format.name!r}, got "
            f"{lowest if lowest < 0 else highest}"
        )


def is_blocks(format: Format) -> bool:
    """Whether codes are blocks of bytes."""
    return format.codec in BLOCK_BYTES


def little_endian(b: Tensor) -> Tensor:  # (..., 2 W) integers below 256 -> (..., W)
    """Words of 16 bits."""
    return b[..., 0::2] | b[..., 1::2] << 8


def block_scales(blocks: Tensor, codec: str) -> Tensor:  # (..., bytes) uint8 -> (...) fp32
    """The fp16 number of each block of a codec of `structured.BLOCK_BYTES`: in the first two bytes, but of IQ1_M in the
    top nibbles of the last four words.
    """
    if codec == "iq1_m":
        top = little_endian(blocks[..., 48:56].long()) >> 12
        bits = top[..., 0] | top[..., 1] << 4 | top[..., 2] << 8 | top[..., 3] << 12
    else:
        bits = little_endian(blocks[..., :2].long())[..., 0]
    return bits.to(torch.int16).view(torch.float16).to(torch.float32)


def _code_dtype(format: Format) -> torch.dtype:
    return torch.uint8 if format.bits <= 8 or is_blocks(format) else torch.int64


def _row_slices(n: int, k: int) -> list[slice]:
    step = max(1, _SLICE_CODES // max(1, k))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


def _units(
    values: Tensor, size: int
) -> Tensor:  # (N, K) -> (N, units, size), the last one padded with zeros
    n, k = values.shape
    padded = values.new_zeros(n, -(-k // size) * size)
    padded[:, :k] = values
    return padded.view(n, -1, size)


def _pack_slice(codes: Tensor, format: Format) -> Tensor:
    if format.base:
        units = _units(codes, digits_per_byte(format.base))
        # No sum is above 255.
        place = [units[..., i] * format.base**i for i in range(units.shape[-1])]
        return torch.stack(place).sum(0, dtype=torch.uint8)
    if (b := format.bits) == 8:
        return codes
    if b > 8:
        return _pack_wide(codes, b)
    # A word holds 8 codes, a byte each; what lies between them is squeezed out.
    words = _units(codes, 8).view(torch.int64)
    for width, low, high in _halves(b):
        words = words & low | words >> width - b * width // 8 & high
    stream = words.view(torch.uint8)[..., :b]
    return stream.reshape(len(codes), -1)[:, : -(-codes.shape[1] * b // 8)]


def _unpack_slice(packed: Tensor, format: Format, k: int) -> Tensor:
    if format.base:
        digits = [
            packed // format.base**i % format.base for i in range(digits_per_byte(format.base))
        ]
        return torch.stack(digits, dim=-1).view(len(packed), -1)[:, :k]
    k = format.num_vectors(k)
    if (b := format.bits) == 8:
        return packed
    if b > 8:
        return _unpack_wide(packed, b, k)
    units = _units(packed, b)
    spread = units.new_zeros(*units.shape[:2], 8)
    spread[..., :b] = units
    words = spread.view(torch.int64)
    for width, low, high in reversed(_halves(b)):
        words = words & low | (words & high) << width - b * width // 8
    return words.view(torch.uint8).view(len(packed), -1)[:, :k]


def _places(bits: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first byte of each code of a row, and its first bit there."""
    first = torch.arange(count, dtype=torch.int64, device=device) * bits
    return first // 8, first % 8


def _pack_wide(codes: Tensor, bits: int) -> Tensor:  # (N, C) int64 -> (N, row bytes) uint8
    byte, shift = _places(bits, codes.shape[1], codes.device)
    spread = codes << shift
    # No bit is set twice, so that sums are unions.
    stream = codes.new_zeros(len(codes), -(-codes.shape[1] * bits // 8) + 5)
    for i in range((bits + 14) // 8):
        stream.index_add_(1, byte + i, spread >> 8 * i & 255)
    return stream[:, :-5].to(torch.uint8)


def _unpack_wide(packed: Tensor, bits: int, count: int) -> Tensor:  # inverse of `_pack_wide`
    byte, shift = _places(bits, count, packed.device)
    last = max(0, packed.shape[1] - 1)
    spread = torch.zeros((len(packed), count), dtype=torch.int64, device=packed.device)
    for i in range((bits + 14) // 8):
        # Bytes beyond the row have no bit of a code.
        spread |= packed[:, (byte + i).clamp(max=last)].to(torch.int64) << 8 * i
    return spread >> shift & (1 << bits) - 1


def _halves(bits: int) -> list[tuple[int, int, int]]:
    """(width, low, high): pairs of lanes of `width` bits hold one code each, or two, or four; where those of the lower
    lane and of the upper one are when they lie next to each other.
    """
    found = []
    for width in (8, 16, 32):
        used = bits * width // 8
        low = sum((1 << used) - 1 << start for start in range(0, 64, 2 * width))
        found.append((width, low, low << used))
    return found
