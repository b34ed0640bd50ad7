"""What every method needs of a grid: checks, slices and groups of a weight, scales fitted per group, and the nearest
code of every weight for the scales, zeros and table at hand. Plain torch, any device.

Scales are rounded to their stored dtype first and codes are chosen against what is stored. The fit is done in float64
on one value per group, the codes in fp32; rows are processed in slices, so temporaries stay below about 20 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowbit import ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import Format
from lowbit.methods.nearest import Nearest, nearest_codes
from lowbit.methods.scales import store
from lowbit.ops import checks
from lowbit.weights.quantized import QuantTensor, tensor_specs

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The range of a group and a code beyond its largest weight still fit fp32.
MAX_MAGNITUDE = 2.0**126
# Temporaries of a few MiB: larger ones are no faster, and the allocator of C does not give them back.
_SLICE_WEIGHTS = 1 << 18
GRANULARITIES = ("group", "tensor")
Round = Callable[[Tensor], Tensor]


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the argument `name` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_granularity(granularity: str, format: Format) -> bool:
    """Whether the whole weight is one group; raises ValueError if it is no granularity."""
    one_of("granularity", granularity, GRANULARITIES)
    if granularity == "tensor" and format.scale is None:
        raise ValueError(f"granularity 'tensor' needs scales, format {format.name!r} has none")
    return granularity == "tensor"


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
    if more := format.more_terms:
        raise ValueError(
            f"format {format.name!r} has {more}: lowbit.quantize finds them, for every method"
        )
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


def empty(weight: Tensor, format: Format) -> QuantTensor:
    """A QuantTensor for `weight` whose tensors are 0."""
    n, k = weight.shape
    specs = tensor_specs(format, n, k).items()
    return QuantTensor(
        format,
        (n, k),
        {name: torch.zeros(s, dtype=dtype, device=weight.device) for name, (s, dtype) in specs},
    )


def start(weight: Tensor, format: Format) -> QuantTensor:
    """A QuantTensor with scales and zeros fitted to `weight`; codes and a fitted table are still
    0.
    """
    qt = empty(weight, format)
    if format.scale is not None:
        store(qt, *ranges(weight, format))
    return qt


def ranges(weight: Tensor, format: Format, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """What the scales of all groups are made of, (N, groups) fp64 each, as the scale rule says.

    The least and the largest weight for "minmax", else -s and s for the statistic s. With
    `per_tensor` they are those of the whole weight.
    """
    if format.scale_rule == "minmax":
        low = reduce(weight, format, lambda g: g.amin(-1).double())
        high = reduce(weight, format, lambda g: g.amax(-1).double())
        if per_tensor:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        return low, high
    statistic = {
        "absmax": lambda g: g.abs().amax(-1).double(),
        "rms": lambda g: g.double().square().mean(-1).sqrt(),
        "mean": lambda g: g.double().abs().mean(-1),
    }[format.scale_rule]
    value = reduce(weight, format, statistic)
    if per_tensor:
        sizes = group_sizes(weight, format)
        whole = {
            "absmax": lambda v: v.amax(),
            "rms": lambda v: ((v.square() * sizes).sum() / weight.numel()).sqrt(),
            "mean": lambda v: (v * sizes).sum() / weight.numel(),
        }[format.scale_rule]
        value = whole(value).expand_as(value)
    return -value, value


def group_sizes(weight: Tensor, format: Format) -> Tensor:  # (groups,) int64
    """How many weights of a row each group has."""
    return reference.group_index(format, weight.shape[1], weight.device).bincount()


def reduce(weight: Tensor, format: Format, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """`statistic` of every group, (N, groups) fp64; it maps (R, groups, G) to (R, groups)."""
    n, k = weight.shape
    # Not a list of results: small blocks that stay between large ones that go fragment the heap.
    out = torch.empty((n, format.num_groups(k)), dtype=torch.float64, device=weight.device)
    for rows, w in slices(weight):
        out[rows] = torch.cat([statistic(g) for g in group_parts(w, format)], 1)
    return out


def set_table(qt: QuantTensor, table: Tensor) -> None:
    """Stores the table of a fitted format."""
    if qt.table is None:
        raise ValueError(f"table is only for fitted formats, {qt.format.name!r} has its own values")
    checks.check_tensors(table=table)
    if table.shape != qt.table.shape:
        raise ValueError(
            f"table must be of shape {tuple(qt.table.shape)}, got {tuple(table.shape)}"
        )
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
    if zero is not None:
        w = w - reference.per_weight(zero, format, w.shape[1])
    per_weight = reference.per_weight(scale, format, w.shape[1])
    return torch.where(per_weight == 0, 0.0, w / per_weight)


def fill_codes(qt: QuantTensor, weight: Tensor, round: Round = torch.round) -> None:
    """Chooses the nearest code of every weight for the scales, zeros and table of `qt`; of integers
    the one that `round` gives.
    """
    scales = reference.effective_scales(qt)
    for rows, w in slices(weight):
        zero = reference.effective_zeros(qt, rows)
        scale = None if scales is None else scales[rows]
        ratio = scaled(w, qt.format, scale, zero if qt.format.zero == "min" else None)
        codes = _codes(ratio, qt, rows, zero, round)
        qt.tensors["codes"][rows] = torch.ops.lowbit.pack(codes, qt.format.spec)


def _codes(
    ratio: Tensor, qt: QuantTensor, rows: slice, zero: Tensor | None, round: Round
) -> Tensor:
    format = qt.format
    if not format.fitted:
        return find_codes(ratio, format, zero, fixed_table(format, ratio.device), round)
    table = qt.tensors["table"]
    chosen = (
        reference.chosen_tables(qt.tensors["scales"][rows], format)
        if qt.scales is not None
        else None
    )
    if chosen is not None:
        first, second = (find_codes(ratio, format, zero, each) for each in table)
        return torch.where(reference.per_weight(chosen, format, ratio.shape[1]) > 0, second, first)
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
    round: Round = torch.round,  # of integers
) -> Tensor:  # (R, C) uint8
    """The nearest code of every scaled weight."""
    if format.codec == "affine":
        return _affine_codes(ratio, format, zero, round)
    if format.codec in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if format.codec == "e4m3" else torch.float8_e5m2
        top = torch.finfo(dtype).max
        return ratio.clamp(-top, top).to(dtype).view(torch.uint8)
    return (table if isinstance(table, Nearest) else Nearest(table))(ratio)


def _affine_codes(ratio: Tensor, format: Format, zero: Tensor | None, round: Round) -> Tensor:
    # The zero is added after rounding where it is an integer: before it would cost bits of the
    # ratio.
    offset = ratio.new_tensor(0.0 if format.zero else 2.0 ** (format.bits - 1))
    if zero is not None and format.zero != "min":
        offset = reference.per_weight(zero, format, ratio.shape[1])
    code = round(ratio + offset) if format.zero == "float" else round(ratio) + offset
    return code.clamp(0, 2**format.bits - 1).to(torch.uint8)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
