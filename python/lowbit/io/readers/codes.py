"""What readers of several formats do alike: streams of codes in words, formats by their numbers, checks of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import packing
from lowbit.formats import BITS, Format
from lowbit.weights.quantized import QuantTensor

INTEGERS = (torch.int32, torch.int16, torch.int64, torch.uint8, torch.int8)
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# A format that loses little of any weight, for those that no format holds.
NEAREST = "int8_g32"
Spec = tuple[tuple[int, ...], torch.dtype]


def affine(
    bits: int, group: int | None, k: int, scale: torch.dtype | str, zero: str | None = None
) -> Format:
    """An integer format of at least so many bits; one group that spans the row is the row."""
    width = next(b for b in BITS if b >= max(2, bits))
    group = None if group is None or group >= k else group
    kind = {None: "int", "int": "uint", "float": "uint", "min": "uint"}[zero]
    tail = {"float": "_zfloat", "min": "_min"}.get(zero or "", "")
    dtype = scale if isinstance(scale, str) else FLOATS[scale]
    return Format(
        name=f"{kind}{width}{tail}_{'row' if group is None else f'g{group}'}_{dtype}",
        codec="affine",
        bits=width,
        group=group,
        scale=dtype,
        scale_rule="absmax" if zero is None else "minmax",
        zero=zero,
    )


def float8(group: int | None, k: int, scale: str) -> Format:
    """E4M3 with a scale of this dtype per group; one group that spans the row is the row."""
    group = None if group is None or group >= k else group
    tail = "row" if group is None else f"g{group}"
    return Format(name=f"e4m3_{tail}_{scale}", codec="e4m3", bits=8, group=group, scale=scale)


def of_rows(blocks: Tensor, rows: int, n: int) -> Tensor:
    """The scales (N, groups) of blocks (ceil(N / rows), groups) that several rows share."""
    return blocks.repeat_interleave(rows, 0)[:n].contiguous()


def stream_bytes(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows (R, W) of little-endian words, each a stream of `count` codes, as canonical rows of bytes."""
    raw = words.contiguous().view(torch.uint8)
    size = -(-count * bits // 8)
    out = raw[:, :size].contiguous()
    if unused := size * 8 - count * bits:
        out[:, -1] &= 0xFF >> unused
    return out


def stream_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes of such rows, (R, count) uint8."""
    if bits not in BITS:
        single = stream_codes(words, 1, count * bits).view(len(words), count, bits)
        shifts = torch.arange(bits, dtype=torch.uint8, device=words.device)
        return (single << shifts).sum(-1, dtype=torch.uint8)
    # Only its bits count here.
    return packing.unpack_codes(stream_bytes(words, bits, count), _plain(bits), count)


def pack(codes: Tensor, format: Format, **tensors: Tensor) -> QuantTensor:
    """A weight of (N, K) uint8 codes and the other tensors of its format, made contiguous."""
    made = {"codes": packing.pack_codes(codes, format)}
    made.update((name, t.contiguous()) for name, t in tensors.items())
    return QuantTensor(format, (codes.shape[0], codes.shape[1]), made)


def weight_of_words(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    shape: tuple[int, int],
    group: int,
) -> QuantTensor:
    """A weight scale * (code - zero) of streams of codes, as GPTQ and compressed-tensors have them.

    Args:
        words: (N, words of K codes) int32.
        scales: (N, groups) in fp32, bf16 or fp16.
        zeros: (groups, words of N codes) int32, the zeros themselves; None if all are the middle, 2^(bits - 1).
        bits: of a code, 2 to 8.
        shape: (N, K).
        group: columns that share a scale.

    Raises:
        ValueError: a shape or a dtype is another one.
    """
    n, k = shape
    groups = -(-k // group)
    check("words", (tuple(words.shape), words.dtype), (n, -(-k * bits // 32)), (torch.int32,))
    check("scales", (tuple(scales.shape), scales.dtype), (n, groups), FLOATS)
    format = affine(bits, group, k, scales.dtype, None if zeros is None else "int")
    named = {"scales": scales}
    if zeros is not None:
        wanted = (groups, -(-n * bits // 32))
        check("zeros", (tuple(zeros.shape), zeros.dtype), wanted, (torch.int32,))
        named["zeros"] = stream_codes(zeros, bits, n).t()
    if format.bits == bits:
        made = {name: t.contiguous() for name, t in named.items()}
        return QuantTensor(format, shape, {"codes": stream_bytes(words, bits, k), **made})
    codes = stream_codes(words, bits, k)
    if zeros is None:
        codes = codes + ((1 << format.bits - 1) - (1 << bits - 1))
    return pack(codes, format, **named)


def need(specs: Mapping[str, Spec], part: str) -> Spec:
    """The shape and dtype of a part that a layer must have."""
    if part not in specs:
        raise ValueError(f"{part} is missing, the layer has {', '.join(sorted(specs))}")
    return specs[part]


def check(
    part: str, spec: Spec, shape: Collection[int | None], dtypes: Collection[torch.dtype]
) -> None:
    """Raises ValueError unless a part has one of the dtypes, and the shape (None: any size)."""
    found, dtype = spec
    if dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{part} must be {names}, got {str(dtype).removeprefix('torch.')}")
    wanted = tuple(shape)
    if len(found) != len(wanted) or any(
        w is not None and f != w for f, w in zip(found, wanted, strict=True)
    ):
        text = ", ".join("any" if w is None else str(w) for w in wanted)
        raise ValueError(f"{part} must have shape ({text}), got {found}")
    if 0 in found:
        raise ValueError(f"{part} must not be empty, got shape {found}")


def integer(config: Mapping[str, Any], key: str, allowed: Collection[int] | None = None) -> int:
    """An integer of a configuration: one of `allowed`, or positive."""
    value = config.get(key)
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or (value not in allowed if allowed is not None else not 0 < value < 2**31):  # type: ignore[operator]
        expected = f"one of {tuple(allowed)}" if allowed is not None else "a positive integer"
        raise ValueError(f"{key} of the configuration must be {expected}, got {value!r:.100}")
    assert isinstance(value, int)
    return value


def group_size(config: Mapping[str, Any], key: str = "group_size") -> int | None:
    """A group size of a configuration; None, for which -1 may stand, is the whole row."""
    return None if config.get(key, -1) in (-1, None) else integer(config, key)


def _plain(bits: int) -> Format:
    table = None if bits > 1 else (0.0, 1.0)
    return Format(name=f"codes{bits}", codec="lut" if table else "affine", bits=bits, table=table)
