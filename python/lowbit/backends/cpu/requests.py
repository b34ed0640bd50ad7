"""What the compiled kernels are told of a weight apart from its bytes, and the codes of csrc/core/kernel.h."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit import _C
from lowbit.formats import Format, parse
from lowbit.layouts import LAYOUTS, N16, Operands
from lowbit.reference import dynamic_values
from lowbit.strides import address, address_of_rows

# csrc/core/kernel.h Dtype; uint8 holds eight signs.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
# csrc/core/kernel.h Activation
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    None: None,
}
_SCOPES = {"tensor": "shared", "pair": "pair", "row": "column", "group": "column"}
_ZERO_MODES = {None: "none", "int": "subtract", "float": "subtract", "min": "add"}

# Keyed by the identity of the format: its hash visits every field, which takes longer than a small call.
_weights: dict[tuple[object, ...], tuple[Format, _C.Weight]] = {}
# Keyed also by the addresses of the tensors: one that moved is another weight.
_bound: dict[tuple[object, ...], tuple[Format, _C.BoundWeight]] = {}
_MAX_WEIGHTS = 4096

# Whether the compiled calls read tensors by themselves: from torch 2.10 on.
_C.use_tensor_class(torch.Tensor, torch.nn.Parameter)
_C.use_dynamic_map(list(dynamic_values()))
linear_tensors, linear_many_tensors = _C.linear_tensors, _C.linear_many_tensors
kernels, isa_active = _C.kernels, _C.isa_active
# The kernels that ran since it was last called, and the threads that a call gets.
take_kernels_run, usable_threads = _C.take_kernels_run, _C.usable_threads


def weight(
    format: Format, n: int, k: int, scales: torch.dtype | None, zeros: torch.dtype | None
) -> _C.Weight:
    """What the kernels know of a weight apart from its bytes; one object per distinct request."""
    key = (id(format), n, k, scales, zeros)
    entry = _weights.get(key)
    if entry is not None and entry[0] is format:
        return entry[1]
    group = format.group or k
    of_weight = format.scale in ("e4m3", "dq8")  # whose second level is that of no row
    made = _C.Weight(
        n=n,
        k=k,
        bits=format.bits,
        group=group,
        codec="int" if format.codec == "affine" else format.codec,
        scope=_SCOPES[format.table_scope],
        table_groups=format.num_groups(k) if format.table_scope == "group" else 1,
        zero=_ZERO_MODES[format.zero],
        scale_dtype=format.scale if LAYOUTS[N16].keeps_codes(format) else _NAMES[scales],
        zero_dtype=format.scale
        if format.zero == "min" and format.integer_scales
        else _NAMES[zeros],
        scale2_dtype="fp32" if of_weight else format.scale2,
        scale2_extent=0 if of_weight else format.scale2_group or k,
        int8_x=format.activation is not None,
        x_group=format.activation_group or 0,
        table_step=_table_step(format),
        bf16_table=format.exact_in_bf16,
        trits=format.packing == "trits",
    )
    if len(_weights) >= _MAX_WEIGHTS:
        _weights.clear()
    _weights[key] = (format, made)
    return made


def x_group(w: Operands) -> int:
    """Values of a row that share one of the scales (M, groups) of x: a block of the activations, or a group."""
    return w.format.activation_group or w.format.group or w.k


def _table_step(format: Format) -> float:
    """What a table is divided by to be int8; 0 says the largest entry / 127."""
    return 0.0 if format.activation == "int8_table" else format.int8_step or 0.0


def expected(format: Format, n: int, k: int) -> _C.Weight:
    """`weight` with the dtypes that the format says."""
    specs = LAYOUTS[N16].specs(format, n, k)
    scales, zeros = (specs[t][1] if t in specs else None for t in ("scales", "zeros"))
    return weight(format, n, k, scales, zeros)


def reads(layout: str) -> bool:
    """Whether the kernels read a layout."""
    return layout == N16


@functools.lru_cache(_MAX_WEIGHTS)
def plan(spec: str, layout: str, n: int, k: int) -> object | None:
    """The first argument of `linear_tensors`, for operands whose dtypes are those of the format; None, which makes it
    return None, for a layout or a shape that no kernel takes.
    """
    if not reads(layout):
        return None
    format = parse(spec)
    if (
        format.more_terms
        or not LAYOUTS[layout].fits(format)
        or not (0 < n < 2**31 and 0 < k < 2**31)
    ):
        return None
    return _C.plan(expected(format, n, k))


def bound(w: Operands) -> _C.BoundWeight:
    """What the kernels know of a weight with its tensors, which the caller keeps alive."""
    format = w.format
    scales = None if w.scales is None else w.scales.dtype
    zeros = None if w.zeros is None else w.zeros.dtype
    # One by one: a loop over the tensors takes longer.
    codes, scale, zero = address(w.codes), address(w.scales), address(w.zeros)
    table, scale2, zero2 = address(w.table), address(w.scales2), address(w.zeros2)
    key = (id(format), w.n, w.k, scales, zeros, codes, scale, zero, table, scale2, zero2)
    entry = _bound.get(key)
    if entry is not None and entry[0] is format:
        return entry[1]
    made = _C.BoundWeight(
        weight(format, w.n, w.k, scales, zeros),
        codes=codes,
        scales=scale,
        zeros=zero,
        table=table,
        scales2=scale2,
        zeros2=zero2,
    )
    if len(_bound) >= _MAX_WEIGHTS:
        _bound.clear()
    _bound[key] = (format, made)
    return made


def of_x(x: Tensor) -> dict[str, int]:
    """The arguments of a compiled call for (M, K) with unit stride along K."""
    x_address, stride = address_of_rows(x)
    return {"x": x_address, "x_dtype": CODES[x.dtype], "m": x.shape[0], "x_stride": stride}


def of_bias(bias: Tensor | None) -> dict[str, int]:
    """The arguments of a compiled call for a contiguous bias or for none."""
    if bias is None:
        return {"bias": 0, "bias_dtype": 0}
    return {"bias": address(bias), "bias_dtype": CODES[bias.dtype]}
