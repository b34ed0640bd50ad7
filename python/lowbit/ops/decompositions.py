"""The ops on weights as arithmetic that other programs have: what `torch.onnx.export(..., dynamo=True)` writes of a
quantized model.

The codes stay packed in the graph, as they lie in the layout "n16": integer division and remainder take them apart, a
table gives their values. torch.compile and torch.export keep the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import layouts, reference
from lowbit.float8 import E8M0_BIAS, FLOAT8, NAN_CODE
from lowbit.formats import Format
from lowbit.layouts import Operands
from lowbit.layouts.n16 import bit_field
from lowbit.ops import library


def _weight(w: Operands) -> Tensor:  # (N, K) fp32
    """What lowbit::dequantize computes, bit for bit.

    A row for each group, so that no graph holds a scale for each weight: what it computes of constants is stored.
    """
    f, size = w.format, w.format.group or w.k
    values = reference.code_values(_codes(w), f, _table(w), _chosen(w))
    by_group = F.pad(values, (0, -w.k % size)).reshape(-1, size)
    terms = (None if t is None else t.reshape(-1, 1) for t in _group_terms(w))
    return reference.apply_scales(by_group, f, *terms).reshape(w.n, -1)[:, : w.k]


def _codes(w: Operands) -> Tensor:  # (N, K) int32
    return layouts.find(w.layout).unpack_by_division(w.codes, w.format, w.n, w.k)


def _table(w: Operands) -> Tensor | None:
    return None if w.table is None else layouts.find(w.layout).unpack_table(w.table, w.format, w.n)


def _chosen(w: Operands) -> Tensor | None:  # (N, groups) int32
    if w.scales is None or w.format.table_scope != "pair":
        return None
    return layouts.find(w.layout).to_rows(w.scales.int() % 2, w.n)


def _group_terms(w: Operands) -> tuple[Tensor | None, Tensor | None]:  # (N, groups) fp32
    """`layouts.group_terms` with zeros that are integers centred, as the table is."""
    f, layout = w.format, layouts.find(w.layout)

    def finished(t: Tensor | None, second: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        known = layout.integers_by_division(t, f) if f.integer_scales else _floats(t, f)
        rows = layout.to_rows(known, w.n)
        if second is None:
            return rows.float()
        if f.scale == "dq8":
            return _double(rows, second)
        by_row = second if second.dim() == 1 else layout.to_rows(second, w.n)
        return reference.of_two_levels(rows, by_row, f)

    zeros = w.zeros
    if zeros is not None and f.zero == "int":
        return finished(w.scales, w.scales2), layout.to_rows(zeros, w.n).float()
    return finished(w.scales, w.scales2), finished(zeros, w.zeros2)


def _double(codes: Tensor, second: Tensor) -> Tensor:
    """Scales of "dq8". The table is put together of numbers: graphs of exporters hold no constant of many."""
    known = [
        torch.full((), v, dtype=torch.float32, device=codes.device)
        for v in reference.dynamic_values()
    ]
    of_weight = layouts.factors_and_offset(second)
    return reference.of_double_quantization(codes, *of_weight, table=torch.stack(known))


def _floats(scales: Tensor, f: Format) -> Tensor:
    """Scales that are floats, or bytes that stand for some."""
    if f.scale not in ("e8m0", "e4m3"):
        return scales
    code = torch.arange(256, dtype=torch.int32, device=scales.device)
    made = _e8m0(code) if f.scale == "e8m0" else _e4m3(code)
    return made[scales.long()]


def _e8m0(code: Tensor) -> Tensor:
    """`float8.e8m0_values` without types of eight bits."""
    return torch.where(code == 255, torch.nan, 2.0 ** (code - E8M0_BIAS).float())


def _e4m3(code: Tensor) -> Tensor:
    """The values of the type "e4m3" without types of eight bits."""
    kind = FLOAT8[torch.float8_e4m3fn]
    magnitude, sign = code % 128, 1 - 2 * bit_field(code, 7, 1)
    exponent, mantissa = bit_field(code, kind.mantissa, 4), magnitude % 2**kind.mantissa
    normal = (2**kind.mantissa + mantissa).float() * 2.0 ** (exponent - 1).float()
    value = torch.where(exponent > 0, normal, mantissa.float()) * kind.min_normal / 2**kind.mantissa
    return torch.where(magnitude == NAN_CODE, torch.nan, sign * value)


def _product(x: Tensor, w: Operands, bias: Tensor | None) -> Tensor:  # (..., N) fp32
    if w.format.activation is None:
        return F.linear(x.float(), _weight(w), None if bias is None else bias.float())
    q, x_scales = reference.quantize_int8(x.reshape(-1, w.k), w.format.activation_group)
    return _int8_product(q, x_scales, w, bias).view(*x.shape[:-1], w.n)


def _int8_product(q: Tensor, x_scales: Tensor, w: Operands, bias: Tensor | None) -> Tensor:
    return reference.int8_linear(
        q, x_scales, _codes(w), w.format, *_group_terms(w), _table(w), bias
    )


def _linear(x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
    y = _product(x, w, bias)
    return (y if added is None else y + added).to(x.dtype)


def _conv(
    x: Tensor, x_scales: Tensor | None, w: Operands, bias: Tensor | None, *rest: Any
) -> Tensor:
    *geometry, activation = rest
    if x_scales is not None or w.format.activation is not None:
        raise NotImplementedError(
            f"convolutions with int8 activations are not exported, got format {w.format.name!r}: leave out its suffix"
        )
    y = reference.convolution(x, _weight(w), bias, reference.Geometry(*geometry))
    return reference.apply_epilogue(y, activation, None, None).to(x.dtype)


def _linear_epilogue(x: Tensor, w: Operands, *rest: Any) -> Tensor:
    bias, gate, residual, added, activation = rest
    y = _product(x, w, bias)
    y = y if added is None else y + added
    return reference.apply_epilogue(y, activation, gate, residual).to(x.dtype)


def _linear_many(x: Tensor, weights: list[Operands], biases: list[Tensor | None]) -> list[Tensor]:
    return [_linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]


def _dequantize(w: Operands, dtype: torch.dtype) -> Tensor:
    return _weight(w).to(dtype)


def _embedding(indices: Tensor, w: Operands, dtype: torch.dtype) -> Tensor:
    return F.embedding(indices, _weight(w)).to(dtype)


def _sparse_linear(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    zeros = torch.zeros((columns.shape[0], x.shape[-1]), dtype=torch.float32, device=x.device)
    return F.linear(x.float(), reference.add_outliers(zeros, columns, values))


def _low_rank_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return reference.low_rank_product(x.float(), left, right)


def _int8_linear(q: Tensor, x_scales: Tensor, w: Operands, *rest: Any) -> Tensor:
    bias, dtype, out_scale = rest
    y = _int8_product(q, x_scales, w, bias)
    return y.to(dtype) if out_scale is None else reference.requantize(y, out_scale)


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "dequantize": _dequantize,
    "embedding": _embedding,
    "int8_linear": _int8_linear,
    "int8_quantize": reference.quantize_int8,
    "linear": _linear,
    "linear_epilogue": _linear_epilogue,
    "linear_many": _linear_many,
    "linear_trainable": _linear,
    "low_rank_linear": _low_rank_linear,
    "sparse_linear": _sparse_linear,
}


def add_to(exporter: Any) -> None:
    """Lets the table of definitions that torch.onnx makes have these too.

    They are not in torch's own table, `torch._decomp`, as shapes that are not known would then be found by them.

    Args:
        exporter: the module of torch.onnx that makes the table.
    """
    create = exporter.create_onnx_friendly_decomposition_table

    @functools.wraps(create)
    def with_ours(registered: Any) -> Any:
        ours = library.flat_calls(DECOMPOSITIONS)
        return create(registered) | {op: made for op, made in ours.items() if op not in registered}

    exporter.create_onnx_friendly_decomposition_table = with_ours
