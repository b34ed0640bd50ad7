"""Round to nearest: scales fitted per group, then the nearest code of every weight. Plain torch,
any device.

Scales are rounded to their stored dtype first and codes are chosen against what is stored, so a
code is always the best one for the scale that is applied to it. The fit is done in float64 on one
value per group, the codes in fp32; rows are processed in slices, so temporaries stay below about
20 MiB whatever the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowbit import ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import DQ_BLOCK, Format, as_format
from lowbit.tensor import SCALE_DTYPES, QuantTensor, tensor_specs

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The range of a group and a code beyond its largest weight still fit fp32.
MAX_MAGNITUDE = 2.0**126
# Temporaries of a few MiB: larger ones are no faster, and the allocator of C does not give them back.
_SLICE_WEIGHTS = 1 << 18
_E4M3_MAX = 448.0
_FP32_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def quantize(weight: Tensor, format: Format | str, *, table: Tensor | None = None) -> QuantTensor:
    """Rounds every weight to the nearest value of its group.

    The scale of a group is, by `format.scale_rule`: "absmax": absmax / (2^(bits - 1) - 0.5) for
    integers (the full range, as GPTQ) and absmax / max|value| for tables and fp8, where a fitted
    table counts as one in [-1, 1]; "rms" and "mean": that statistic of |w|; "minmax": (max - min) /
    (2^bits - 1), where the range of zero "int" and "float" includes 0. With zeros and a rule other
    than "minmax" the grid is centred on 0. A scale that would round to 0 becomes the smallest
    positive one; a group of zeros has scale 0 where the dtype has a 0. "e8m0" scales follow OCP MX,
    2^(floor(log2 absmax) - floor(log2 max|value|)) (2^(bits - 1) - 1 for integers), round up for
    "minmax" and to the nearest power of two otherwise.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32.
        format: any Format or its name; a fitted one needs `table`.
        table: values of the codes of a fitted format, in the shape that `tensor_specs` gives.

    Raises:
        TypeError: weight is not a floating tensor.
        ValueError: weight is not a matrix, is empty, holds NaN, inf or a value above 2^126, or
            needs a scale beyond the format's dtype; `table` is missing, not wanted, of the wrong
            shape or not finite; the scale rule does not fit the codec.
    """
    format = as_format(format)
    check_weight(weight, format)
    if format.fitted and table is None:
        raise ValueError(
            f"format {format.name!r} has no table of its own: use method='kmeans' or pass table"
        )
    qt = start(weight, format)
    if table is not None:
        set_table(qt, table)
    fill_codes(qt, weight)
    return qt


def check_weight(weight: Tensor, format: Format) -> None:
    """Raises unless `weight` is a matrix that can be quantized: finite, at most 2^126."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight must be one of {_names(WEIGHT_DTYPES)}, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight must be a non-empty (N, K) matrix, got shape {tuple(weight.shape)}"
        )
    if weight.is_meta:
        raise ValueError("weight must hold values, got a meta tensor")
    if format.scale_rule == "minmax" and format.zero is None:
        raise ValueError(
            f"scale_rule 'minmax' needs an affine format with a zero, {format.name!r} has none"
        )
    for rows, w in slices(weight):
        bad = ~(w.abs() <= MAX_MAGNITUDE)
        if bool(bad.any()):
            n, k = (int(i) for i in bad.nonzero()[0])
            value = float(weight[rows.start + n, k])
            reason = "is above 2^126" if math.isfinite(value) else "is not finite"
            raise ValueError(f"weight[{rows.start + n}, {k}] = {value} {reason}")


def slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their values in fp32."""
    n, k = weight.shape
    step = max(1, _SLICE_WEIGHTS // k)
    for begin in range(0, n, step):
        rows = slice(begin, min(n, begin + step))
        yield rows, weight[rows].to(torch.float32)


def group_parts(values: Tensor, format: Format) -> list[Tensor]:  # (R, K) -> (R, groups, weights)
    """The whole groups and, if K is not a multiple of the group, the short last one. Views."""
    rows, k = values.shape
    group = min(format.group or k, k)
    whole = k // group * group
    parts = [values[:, :whole].unflatten(1, (-1, group))]
    if whole < k:
        parts.append(values[:, whole:].view(rows, 1, k - whole))
    return parts


def start(weight: Tensor, format: Format) -> QuantTensor:
    """A QuantTensor with scales and zeros fitted to `weight`; codes and a fitted table are still
    0.
    """
    n, k = weight.shape
    qt = QuantTensor(
        format,
        (n, k),
        {
            name: torch.zeros(shape, dtype=dtype, device=weight.device)
            for name, (shape, dtype) in tensor_specs(format, n, k).items()
        },
    )
    if format.scale is None:
        return qt
    if format.scale_rule == "minmax":
        low = _reduce(weight, format, lambda g: g.amin(-1).double())
        high = _reduce(weight, format, lambda g: g.amax(-1).double())
        if format.zero != "min":
            low, high = low.clamp(max=0), high.clamp(min=0)
        _store_scales(qt, (high - low) / (2**format.bits - 1))
        _store_range_zeros(qt, low, high)
        return qt
    statistic = {
        "absmax": lambda g: g.abs().amax(-1).double(),
        "rms": lambda g: g.double().square().mean(-1).sqrt(),
        "mean": lambda g: g.double().abs().mean(-1),
    }[format.scale_rule]
    scale = _reduce(weight, format, statistic)
    _store_scales(qt, scale / _unit(format) if format.scale_rule == "absmax" else scale)
    middle = 2 ** (format.bits - 1)
    if format.zero == "min":
        _store_zeros(qt, -middle * _effective(qt))
    elif format.zero is not None:
        qt.tensors["zeros"].fill_(middle)
    return qt


def _reduce(weight: Tensor, format: Format, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """`statistic` of every group, (N, groups) fp64."""
    n, k = weight.shape
    # Not a list of results: small blocks that stay between large ones that go fragment the heap.
    out = torch.empty((n, format.num_groups(k)), dtype=torch.float64, device=weight.device)
    for rows, w in slices(weight):
        out[rows] = torch.cat([statistic(g) for g in group_parts(w, format)], 1)
    return out


def _unit(format: Format) -> float:
    """The value that absmax is scaled to; a power of two for "e8m0", whose scale is rounded
    down.
    """
    if format.codec == "affine":
        unit = 2 ** (format.bits - 1) - 0.5
    elif format.fitted:
        unit = 1.0
    else:
        unit = max(abs(v) for v in format.values() or () if math.isfinite(v))
    return 2.0 ** (math.frexp(unit)[1] - 1) if format.scale == "e8m0" else unit


def _store_scales(qt: QuantTensor, scale: Tensor) -> None:  # (N, groups) fp64, not negative
    kind = qt.format.scale or ""
    if kind == "e8m0":
        _store_e8m0(qt, scale)
        return
    single = _round_up_tiny(scale, torch.float32)
    if kind == "e4m3":
        _store_e4m3(qt.tensors, single)
    elif kind == "dq8":
        _store_dq8(qt.tensors, single)
    else:
        stored = _round_up_tiny(single, SCALE_DTYPES[kind])
        _check_fits(qt, "scale", stored, scale)
        qt.tensors["scales"].copy_(stored)


def _store_e8m0(qt: QuantTensor, scale: Tensor) -> None:
    # scale = mantissa * 2^exponent with mantissa in [0.5, 1): floor(log2 scale) = exponent - 1.
    mantissa, exponent = torch.frexp(scale)
    power = exponent - 1
    if qt.format.scale_rule == "minmax":
        power = torch.where(mantissa == 0.5, power, exponent)
    elif qt.format.scale_rule != "absmax":
        power = torch.where(mantissa < math.sqrt(0.5), power, exponent)
    code = torch.where(scale > 0, power + 127, 0).clamp(0, 254)
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
    index = nearest_codes(ratio, reference.dynamic_map().to(ratio.device))
    tensors["scales"].copy_(index.flatten()[: flat.numel()].view_as(scale))
    tensors["scales2"].copy_(factor.flatten())
    tensors["scales2_offset"].copy_(offset)


def _effective(qt: QuantTensor) -> Tensor:  # (N, groups) fp64
    scales = reference.effective_scales(qt)
    assert scales is not None
    return scales.double()


def _store_range_zeros(qt: QuantTensor, low: Tensor, high: Tensor) -> None:
    """Zeros that put the first code at the low end of the range."""
    if qt.format.zero == "min":
        _store_zeros(qt, low)
        return
    scale = _effective(qt)
    # Double quantization may give a small scale the wrong sign; the first code is then at the high
    # end.
    end = torch.where(scale < 0, high, low)
    zero = torch.where(scale == 0, 0.0, -end / scale)
    top = 2**qt.format.bits - 1
    _store_zeros(qt, zero.round().clamp(0, top) if qt.format.zero == "int" else zero.clamp(0, top))


def _store_zeros(qt: QuantTensor, zero: Tensor) -> None:
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
            f"fit {qt.format.scale}: use a format with fp32 or bf16 scales"
        )


def set_table(qt: QuantTensor, table: Tensor) -> None:
    """Stores the table of a fitted format."""
    if qt.table is None:
        raise ValueError(f"table is only for fitted formats, {qt.format.name!r} has its own values")
    if not isinstance(table, Tensor) or table.shape != qt.table.shape:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table must be a tensor of shape {tuple(qt.table.shape)}, got {got}")
    qt.tensors["table"].copy_(table)
    if not bool(torch.isfinite(qt.table).all()):
        raise ValueError("table must be finite in fp32, it holds NaN or inf")


def scaled(
    w: Tensor,  # (R, K) fp32
    format: Format,
    scale: Tensor | None,  # (R, groups) fp32
    zero: Tensor | None = None,  # (R, groups) fp32, only for zero "min"
) -> Tensor:  # (R, K) fp32
    """(w - zero) / scale, and 0 where the scale is 0."""
    if scale is None:
        return w
    group = reference.group_index(format, w.shape[1], w.device)
    if zero is not None:
        w = w - zero[:, group]
    per_weight = scale[:, group]
    return torch.where(per_weight == 0, 0.0, w / per_weight)


def fill_codes(qt: QuantTensor, weight: Tensor) -> None:
    """Chooses the nearest code of every weight for the scales, zeros and table of `qt`."""
    scales = reference.effective_scales(qt)
    for rows, w in slices(weight):
        zero = None if qt.zeros is None else qt.zeros[rows].to(torch.float32)
        scale = None if scales is None else scales[rows]
        ratio = scaled(w, qt.format, scale, zero if qt.format.zero == "min" else None)
        codes = _codes(ratio, qt, rows, zero)
        qt.tensors["codes"][rows] = torch.ops.lowbit.pack(codes, qt.format.spec)


def _codes(ratio: Tensor, qt: QuantTensor, rows: slice, zero: Tensor | None) -> Tensor:
    format = qt.format
    if not format.fitted:
        return find_codes(ratio, format, zero, fixed_table(format, ratio.device))
    table = qt.tensors["table"]
    if format.table_scope != "group":
        return find_codes(ratio, format, zero, table if table.dim() == 1 else table[rows])
    begin, codes = 0, []
    for part in group_parts(ratio, format):
        groups = part.shape[1]
        own = table[rows][:, begin : begin + groups].flatten(0, 1)
        codes.append(nearest_codes(part.flatten(0, 1), own).view(part.shape[0], -1))
        begin += groups
    return torch.cat(codes, 1)


def fixed_table(format: Format, device: torch.device) -> Tensor:  # (codes,) fp32
    """The values of the codes of a format that is not fitted."""
    return torch.tensor(format.values(), dtype=torch.float32, device=device)


def find_codes(
    ratio: Tensor,  # (R, C) fp32, from `scaled`
    format: Format,
    zero: Tensor | None,  # (R, groups of C) fp32
    table: Tensor | Nearest,  # (E,) or (R, E): the values of the codes
) -> Tensor:  # (R, C) uint8
    """The nearest code of every scaled weight."""
    if format.codec == "affine":
        return _affine_codes(ratio, format, zero)
    if format.codec in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if format.codec == "e4m3" else torch.float8_e5m2
        top = torch.finfo(dtype).max
        return ratio.clamp(-top, top).to(dtype).view(torch.uint8)
    return (table if isinstance(table, Nearest) else Nearest(table))(ratio)


def _affine_codes(ratio: Tensor, format: Format, zero: Tensor | None) -> Tensor:
    group = reference.group_index(format, ratio.shape[1], ratio.device)
    # The zero is added after rounding where it is an integer: before it would cost bits of the
    # ratio.
    offset = torch.tensor(0.0 if format.zero else 2.0 ** (format.bits - 1), device=ratio.device)
    if zero is not None and format.zero != "min":
        offset = zero[:, group]
    code = (ratio + offset).round() if format.zero == "float" else ratio.round() + offset
    return code.clamp(0, 2**format.bits - 1).to(torch.uint8)


class Nearest:
    """Finds the nearest entry of a table: ties go to the lower value, equal entries to the first of
    them. Called with values (R, C) fp32 it gives indices (R, C) uint8.
    """

    def __init__(self, table: Tensor) -> None:
        """`table`: (E,) or one for each row, (R, E), fp32 in any order."""
        entries, index = table.sort(dim=-1, stable=True)
        low, high = entries[..., :-1].double(), entries[..., 1:].double()
        exact = (low + high) / 2
        middle = exact.to(torch.float32)
        # Rounded down, an fp32 boundary compares with every fp32 value as the exact one does.
        below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        middle = torch.where(middle.double() > exact, below, middle)
        # Between equal entries there is no boundary: the next one takes its place.
        middle = torch.where(low == high, torch.inf, middle)
        self._middle = middle.flip(-1).cummin(-1).values.flip(-1).contiguous()
        self._index = index.to(torch.uint8)

    def __call__(self, values: Tensor) -> Tensor:
        position = torch.searchsorted(self._middle, values.contiguous())
        if self._index.dim() == 1:
            return self._index[position]
        return self._index.gather(1, position)


def nearest_codes(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of every value, as `Nearest` finds it."""
    return Nearest(table)(values)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
