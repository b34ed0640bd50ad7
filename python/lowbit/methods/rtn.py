"""Round to nearest: scales fitted per group, then the nearest code of every weight. Plain torch,
any device.

Scales are rounded to their stored dtype first and codes are chosen against what is stored, so a
code is always the best one for the scale that is applied to it. The fit is done in float64 on one
value per group, the codes in fp32; rows are processed in slices, so temporaries stay below about
20 MiB whatever the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowbit import checks, ops, reference  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import Format, as_format
from lowbit.methods import clipping as clip
from lowbit.methods.nearest import Nearest, nearest_codes
from lowbit.methods.scales import SYMMETRIC_RANGES, store
from lowbit.weights.quantized import QuantTensor, tensor_specs

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The range of a group and a code beyond its largest weight still fit fp32.
MAX_MAGNITUDE = 2.0**126
# Temporaries of a few MiB: larger ones are no faster, and the allocator of C does not give them back.
_SLICE_WEIGHTS = 1 << 18
GRANULARITIES = ("group", "tensor")
CLIPPINGS = ("minmax", "percentile", "mse", "kl")
ROUNDINGS = ("nearest", "stochastic", "floor")
Round = Callable[[Tensor], Tensor]


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    table: Tensor | None = None,
    granularity: str = "group",
    symmetric_range: str = "balanced",
    clipping: str = "minmax",
    percentile: float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> QuantTensor:
    """Rounds every weight to the nearest value of its group.

    The scale of a group is, by `format.scale_rule`: "absmax": absmax / (2^(bits - 1) - 0.5) for
    integers (the full range, as GPTQ) and absmax / max|value| for tables and fp8, where a fitted
    table counts as one in [-1, 1]; "rms" and "mean": that statistic of |w|; "minmax": (max - min) /
    (2^bits - 1), where the range of zero "int" and "float" includes 0. With zeros and a rule other
    than "minmax" the grid is centred on 0. A scale that would round to 0 becomes the smallest
    positive one; a group of zeros has scale 0 where the dtype has a 0. "e8m0" scales follow OCP MX,
    2^(floor(log2 absmax) - floor(log2 max|value|)) (2^(bits - 1) - 1 for integers), round up for
    "minmax" and to the nearest power of two otherwise. "mean" on "binary" is BWN of XNOR-Net (arXiv
    1603.05279), alpha = mean|w|.

    Args:
        weight: (N, K) in fp32, bf16, fp16 or fp64, finite, not empty; computed in fp32.
        format: any Format or its name; a fitted one needs `table`.
        table: values of the codes of a fitted format, in the shape that `tensor_specs` gives.
        granularity: "group", as the format says, or "tensor": the whole weight is one group, and
            its scale and zero are stored in every group.
        symmetric_range: what absmax is divided by for integers without a zero. "balanced": 2^(bits -
            1) - 0.5, the full range of Gholami et al. (arXiv 2103.13630); "full": 2^(bits - 1), as
            FasterTransformer, where absmax saturates; "restricted": 2^(bits - 1) - 1, with codes
            as far below 0 as above.
        clipping: which part of absmax or of (min, max) takes the place of all of it. "minmax": all.
            "percentile": that quantile of |w|, or (1 - percentile, percentile) of w. "mse": the
            fraction 1, 0.99, ..., 0.11 with the least squared error of the group rounded to nearest
            (OMSE as in FQ-ViT, arXiv 2111.13824; scales of two levels count as fp32 in it). "kl":
            the threshold of |w| with the least entropy lost (`clipping.entropy_threshold`), for
            integers whose groups are rows or the tensor.
        percentile: above 0.5 and at most 1; by default 0.99999.
        rounding: of integers, w / scale to the "nearest" (ties to even), to the next below
            ("floor") or "stochastic": up with the probability of the fraction.
        seed: of stochastic rounding.

    Temporaries are small but for "percentile" of a tensor, which copies the weight.

    Raises:
        TypeError: weight is not a floating tensor, or table no tensor.
        ValueError: weight is not a matrix, is empty, holds NaN, inf or a value above 2^126, or
            needs a scale beyond the format's dtype; `table` is missing, not wanted, of the wrong
            shape or not finite; the scale rule does not fit the codec; an option is unknown, out of
            range or does not fit the format.
    """
    format = as_format(format)
    check_weight(weight, format)
    if format.fitted and table is None:
        raise ValueError(
            f"format {format.name!r} has no table of its own: use method='kmeans' or pass table"
        )
    per_tensor = check_granularity(granularity, format)
    _check_options(format, symmetric_range, clipping, percentile, rounding)
    if clipping == "kl" and not per_tensor and format.num_groups(weight.shape[1]) > 1:
        raise ValueError(
            f"clipping 'kl' needs a histogram of a row or of the weight, format {format.name!r} has "
            f"groups of {format.group}: use granularity='tensor' or a format by row"
        )
    restricted = 2 ** (format.bits - 1) - 1 if symmetric_range == "restricted" else None
    qt = empty(weight, format)
    if table is not None:
        set_table(qt, table)
    if format.scale is not None:
        if clipping == "percentile":
            fraction = clip.PERCENTILE if percentile is None else percentile
            low, high = _percentiles(weight, format, per_tensor, fraction)
        else:
            low, high = ranges(weight, format, per_tensor)
        if clipping == "kl":
            top = _thresholds(weight, torch.maximum(-low, high), 2 ** (format.bits - 1), per_tensor)
            low, high = low.maximum(-top), high.minimum(top)
        elif clipping == "mse":
            nearest = _rounder("nearest", restricted)

            def error(low: Tensor, high: Tensor) -> Tensor:
                errors = _squared_errors(weight, format, low, high, symmetric_range, nearest)
                return errors.sum().expand_as(errors) if per_tensor else errors

            low, high = clip.least_error(low, high, error)
        store(qt, low, high, symmetric_range)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    fill_codes(qt, weight, _rounder(rounding, restricted, generator))
    return qt


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


def _check_options(
    format: Format, symmetric_range: str, clipping: str, percentile: float | None, rounding: str
) -> None:
    one_of("symmetric_range", symmetric_range, SYMMETRIC_RANGES)
    one_of("clipping", clipping, CLIPPINGS)
    one_of("rounding", rounding, ROUNDINGS)
    affine, name = format.codec == "affine", f"format {format.name!r}"
    symmetric = affine and format.zero is None and format.scale_rule == "absmax"
    if symmetric_range != "balanced" and not symmetric:
        raise ValueError(
            f"symmetric_range {symmetric_range!r} is for integers without a zero and scales by "
            f"absmax, {name} is none"
        )
    if rounding != "nearest" and not affine:
        raise ValueError(f"rounding {rounding!r} is for integers, {name} has a table")
    if clipping != "minmax" and format.scale_rule not in ("absmax", "minmax"):
        raise ValueError(
            f"clipping {clipping!r} is for scales by absmax or minmax, {name} has "
            f"{format.scale_rule!r}"
        )
    if clipping != "minmax" and (format.scale is None or format.fitted):
        raise ValueError(
            f"clipping {clipping!r} needs scales and values that are not fitted, {name} has "
            f"{'none' if format.scale is None else 'a fitted table'}"
        )
    if clipping == "kl" and not affine:
        raise ValueError(f"clipping 'kl' is for integers, {name} has a table")
    if percentile is not None:
        if clipping != "percentile":
            raise ValueError(f"percentile is for clipping 'percentile', got {clipping!r}")
        clip.check_percentile(percentile)


def _rounder(rounding: str, top: int | None, generator: torch.Generator | None = None) -> Round:
    """Rounds scaled weights to integers, of magnitude `top` at most."""

    def stochastic(ratio: Tensor) -> Tensor:
        below = ratio.floor()
        noise = torch.rand(
            ratio.shape, generator=generator, dtype=torch.float32, device=ratio.device
        )
        return below + (noise < ratio - below)

    rounders: dict[str, Round] = {
        "nearest": torch.round,
        "floor": torch.floor,
        "stochastic": stochastic,
    }
    rounds = rounders[rounding]
    return rounds if top is None else lambda ratio: rounds(ratio).clamp(-top, top)


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
    if format.outliers:
        raise ValueError(
            f"format {format.name!r} has outliers: lowbit.quantize finds them, for every method"
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


def _percentiles(
    weight: Tensor, format: Format, per_tensor: bool, fraction: float
) -> tuple[Tensor, Tensor]:  # (N, groups) fp64 each
    shape = weight.shape[0], format.num_groups(weight.shape[1])
    if per_tensor:
        weight, format = weight.reshape(1, -1), dataclasses.replace(format, group=None)
    if format.scale_rule == "minmax":
        low = reduce(weight, format, lambda g: clip.quantile(g, 1 - fraction))
        high = reduce(weight, format, lambda g: clip.quantile(g, fraction))
    else:
        high = reduce(weight, format, lambda g: clip.quantile(g.abs(), fraction))
        low = -high
    return low.expand(shape), high.expand(shape)


def _thresholds(weight: Tensor, absmax: Tensor, levels: int, per_tensor: bool) -> Tensor:
    """The entropy threshold of |w| of every row, or of the weight; (N, 1) fp64, as `absmax`."""
    tops = absmax[:1, 0] if per_tensor else absmax[:, 0]
    counts = torch.zeros(len(tops), clip.BINS, dtype=torch.float64, device=weight.device)
    for rows, w in slices(weight):
        top = tops if per_tensor else tops[rows]
        width = torch.where(top > 0, top, 1.0)[:, None] / clip.BINS
        index = (w.abs() / width).long().clamp(max=clip.BINS - 1)
        index = index.view(1, -1) if per_tensor else index
        ones = torch.ones((), dtype=torch.float64, device=w.device).expand(index.shape)
        counts[slice(0, 1) if per_tensor else rows].scatter_add_(1, index, ones)
    kept = [clip.entropy_threshold(row, levels) for row in counts]
    return (tops * tops.new_tensor(kept) / clip.BINS).view(-1, 1).expand_as(absmax)


def _squared_errors(
    weight: Tensor, format: Format, low: Tensor, high: Tensor, symmetric_range: str, round: Round
) -> Tensor:
    """sum (w - w^)^2 of every group if its range is low .. high, all (N, groups) fp64."""
    two_levels = format.scale in ("e4m3", "dq8")
    by_row = dataclasses.replace(format, group=None, scale="fp32" if two_levels else format.scale)
    table = fixed_table(format, weight.device)
    nearest = Nearest(table) if format.codec == "lut" else table
    out = torch.empty_like(low)
    for rows, w in slices(weight):
        first = 0
        for part in group_parts(w, format):
            at = rows, slice(first, first + part.shape[1])
            first = at[1].stop
            flat = part.flatten(0, 1)
            qt = empty(flat, by_row)
            store(qt, low[at].reshape(-1, 1), high[at].reshape(-1, 1), symmetric_range)
            scale = reference.effective_scales(qt)
            zero = None if qt.zeros is None else qt.zeros.to(torch.float32)
            ratio = scaled(flat, by_row, scale, zero if format.zero == "min" else None)
            codes = find_codes(ratio, by_row, zero, nearest, round)
            made = reference.apply_scales(table[codes.long()], by_row, scale, zero)
            errors = (flat - made).square().sum(1, dtype=torch.float64)
            out[at] = errors.view(part.shape[:2])
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
        zero = None if qt.zeros is None else qt.zeros[rows].to(torch.float32)
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
