"""Scales and zeros as a format stores them, from the range of every group.

Both are rounded to their stored dtype here; a zero is chosen for the scale as stored.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lowbit import reference
from lowbit.float8 import E8M0_BIAS, FLOAT8
from lowbit.formats import DQ_BLOCK, INTEGER_SCALES, Format
from lowbit.methods.nearest import nearest_codes
from lowbit.weights.quantized import SCALE_DTYPES, QuantTensor

SYMMETRIC_RANGES = ("balanced", "full", "restricted")
_E4M3_MAX = FLOAT8[torch.float8_e4m3fn].max
_FP32_TINY = torch.finfo(torch.float32).tiny


def store(
    qt: QuantTensor, low: Tensor, high: Tensor, symmetric_range: str = SYMMETRIC_RANGES[0]
) -> None:
    """Fits scales and zeros to the range of every group, (N, groups) fp64 each.

    For the rules "rms" and "mean" `high` is that statistic, and the scale.
    """
    format = qt.format
    if format.scale_rule == "minmax":
        if format.zero != "min":
            low, high = low.clamp(max=0), high.clamp(min=0)
        elif not _negative(format):
            # Minima of a super-block have one sign.
            low = low.clamp(max=0)
        store_scales(qt, (high - low) / (2**format.bits - 1))
        _store_zeros(qt, _range_zeros(qt, low, high))
        return
    absmax = format.scale_rule == "absmax"
    store_scales(qt, high / _unit(format, symmetric_range) if absmax else high)
    middle = 2 ** (format.bits - 1)
    if format.zero == "min":
        _store_zeros(qt, -middle * _effective(qt))
    elif format.zero is not None:
        qt.tensors["zeros"].fill_(middle)


def _unit(format: Format, symmetric_range: str) -> float:
    """The value that absmax is scaled to; a power of two for "e8m0", whose scale is rounded
    down.
    """
    if format.codec == "affine":
        short = {"balanced": 0.5, "full": 0.0, "restricted": 1.0}[symmetric_range]
        unit = 2 ** (format.bits - 1) - short
    elif format.fitted:
        unit = 1.0
    else:
        unit = max(abs(v) for v in format.values() or () if math.isfinite(v))
    return 2.0 ** (math.frexp(unit)[1] - 1) if format.scale == "e8m0" else unit


def store_scales(
    qt: QuantTensor,
    scale: Tensor,  # (N, groups) fp64, not negative
    power: str | None = None,
) -> None:
    """Stores given scales in the format's dtype.

    Args:
        power: how an "e8m0" scale becomes a power of two, "down", "up" or "nearest"; by default as
            the format's scale rule wants it.

    Raises:
        ValueError: a scale does not fit the dtype.
    """
    kind = qt.format.scale or ""
    if kind == "e8m0":
        rule = {"absmax": "down", "minmax": "up"}.get(qt.format.scale_rule, "nearest")
        _store_e8m0(qt, scale, power or rule)
        return
    single = _round_up_tiny(scale, torch.float32)
    if kind == "e4m3":
        _store_e4m3(qt.tensors, single)
    elif kind == "dq8":
        _store_dq8(qt.tensors, single)
    elif qt.format.integer_scales:
        _store_integers(qt, "scales", single)
    else:
        stored = _round_up_tiny(single, SCALE_DTYPES[kind])
        _check_fits(qt, "scale", stored, scale)
        qt.tensors["scales"].copy_(stored)


def count_tiny(qt: QuantTensor) -> int:
    """How many scales are so small that rounding them moves the largest weight of a group by half a code."""
    format = qt.format
    stored = qt.tensors.get("scales2" if format.scale2 else "scales")
    if stored is None or stored.dtype not in (torch.float16, torch.float8_e4m3fn):
        return 0
    # Below the normal numbers the step of a dtype is constant. Codes reach twice as far with a zero.
    info = torch.finfo(stored.dtype)
    codes = 2.0 ** (format.bits / format.dim - (1 if format.zero else 2))
    limit = min(info.smallest_normal, info.smallest_normal * info.eps * max(1.0, codes))
    scales = stored.to(torch.float32)
    return int(((scales != 0) & (scales.abs() <= limit)).sum())


def warn_of_tiny(qt: QuantTensor) -> None:
    """Warns once of the scales that `count_tiny` finds."""
    count = count_tiny(qt)
    if not count:
        return
    format = qt.format
    groups = qt.tensors["scales2" if format.scale2 else "scales"].numel()
    what = "super-blocks" if format.scale2 else "groups"
    warnings.warn(
        f"weight: {count} of {groups} {what} ({count / groups:.2%}) are so small that their scales lose digits or "
        f"are rounded up in {format.scale2 or format.scale}, the scale dtype of format {format.name!r}: use a format "
        "with fp32 or bf16 scales, or scale the weight",
        stacklevel=3,
    )


def _store_e8m0(qt: QuantTensor, scale: Tensor, rounding: str) -> None:
    # scale = mantissa * 2^exponent with mantissa in [0.5, 1): floor(log2 scale) = exponent - 1.
    mantissa, exponent = torch.frexp(scale)
    power = exponent - 1
    if rounding == "up":
        power = torch.where(mantissa == 0.5, power, exponent)
    elif rounding == "nearest":
        power = torch.where(mantissa < math.sqrt(0.5), power, exponent)
    code = torch.where(scale > 0, power + E8M0_BIAS, 0).clamp(0, 2 * E8M0_BIAS)
    qt.tensors["scales"].copy_(code)


def _store_e4m3(tensors: dict[str, Tensor], scale: Tensor) -> None:  # (N, groups) fp32
    factor = (scale.max() / _E4M3_MAX).clamp(min=_FP32_TINY)
    tensors["scales2"].copy_(factor)
    code = _round_up_tiny((scale / factor).clamp(max=_E4M3_MAX), torch.float8_e4m3fn)
    tensors["scales"].copy_(code)


def _store_dq8(tensors: dict[str, Tensor], scale: Tensor) -> None:  # (N, groups) fp32
    offset = scale.double().mean().to(torch.float32)
    flat = scale.flatten() - offset
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % DQ_BLOCK)).view(-1, DQ_BLOCK)
    factor = blocks.abs().amax(1, keepdim=True)
    ratio = torch.where(factor > 0, blocks / factor, 0.0)
    index = nearest_codes(ratio, reference.dynamic_map(ratio.device))
    tensors["scales"].copy_(index.flatten()[: flat.numel()].view_as(scale))
    tensors["scales2"].copy_(factor.flatten())
    tensors["scales2_offset"].copy_(offset)


def _negative(format: Format) -> bool:
    """Whether integer scales may be negative; the others share the sign of their second level."""
    return INTEGER_SCALES.get(format.scale or "", (-1, 0))[0] < 0


def _store_integers(qt: QuantTensor, name: str, values: Tensor) -> None:  # (N, groups) fp32
    """Integers, the largest of a super-block at an end of their range; no positive scale becomes 0."""
    f, (n, groups) = qt.format, values.shape
    second = qt.tensors[name + "2"]
    size = f.scale2_group // f.group if f.scale2_group and f.group else groups
    blocks = torch.nn.functional.pad(values, (0, -groups % size)).view(n, -1, size)
    top = INTEGER_SCALES[f.scale or ""][1]
    factor = _round_up_tiny(blocks.abs().amax(2) / top, second.dtype)
    _check_fits(qt, "scale" if name == "scales" else "zero", factor, values)
    if name == "zeros" and not _negative(f):
        factor = -factor
    second.copy_(factor)
    wide = factor.to(torch.float32)[:, :, None]
    codes = torch.where(wide != 0, blocks / wide, 0.0).round()
    codes = codes.clamp(-top if _negative(f) else 0, top)
    codes = torch.where((blocks > 0) & (codes == 0), 1.0, codes) if name == "scales" else codes
    qt.tensors[name].copy_(stored_integers(codes.view(n, -1)[:, :groups], f))


def stored_integers(integers: Tensor, format: Format, chosen: Tensor | int = 0) -> Tensor:
    """Integer scales as they are stored; with a pair of tables beside the number of each group's."""
    return integers * 2 + chosen if format.scale == "int7" else integers


def _store_zeros(qt: QuantTensor, zero: Tensor) -> None:
    if qt.zeros2 is not None:
        _store_integers(qt, "zeros", zero.to(torch.float32))
        return
    stored = zero.to(torch.float32).to(qt.tensors["zeros"].dtype)
    _check_fits(qt, "zero", stored, zero)
    qt.tensors["zeros"].copy_(stored)


def _round_up_tiny(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to `dtype`, but a positive scale never to 0."""
    info = torch.finfo(dtype)
    # finfo.smallest_normal over 2^mantissa bits; eps is 2^-mantissa bits.
    smallest = info.smallest_normal * info.eps
    rounded = torch.where(scale > 0, scale.clamp(min=smallest), scale)
    return rounded.to(torch.float32).to(dtype)


def _check_fits(qt: QuantTensor, what: str, stored: Tensor, wanted: Tensor) -> None:
    """Of the float dtypes only fp16 is too small for weights up to MAX_MAGNITUDE."""
    bad = ~torch.isfinite(stored)
    if bool(bad.any()):
        n, g = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"weight: row {n}, group {g} needs the {what} {float(wanted[n, g]):g}, which does not "
            f"fit {qt.format.scale2 or qt.format.scale}: use a format with fp32 or bf16 scales"
        )


def _effective(qt: QuantTensor) -> Tensor:  # (N, groups) fp64
    scales = reference.effective_scales(qt)
    assert scales is not None
    return scales.double()


def _range_zeros(qt: QuantTensor, low: Tensor, high: Tensor) -> Tensor:
    """Zeros that put the first code at the low end of the range."""
    if qt.format.zero == "min":
        return low
    scale = _effective(qt)
    # Double quantization may give a small scale the wrong sign; the first code is then at the high
    # end.
    end = torch.where(scale < 0, high, low)
    zero = torch.where(scale == 0, 0.0, -end / scale)
    top = 2**qt.format.bits - 1
    return zero.round().clamp(0, top) if qt.format.zero == "int" else zero.clamp(0, top)
