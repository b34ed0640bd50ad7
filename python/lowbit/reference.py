"""The only truth: scales, dequantize, linear and embedding in plain torch, on any device.

Every kernel is tested against this file. All arithmetic is fp32 with one rounding per operation, in the order that
is written here; `linear` is computed in float64.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import modes, packing
from lowbit.formats import DQ_BLOCK, Format
from lowbit.weights.quantized import QuantTensor

INT8_PART = 65536  # csrc/int8.h kMaxInt8Group: weights whose products with int8 are summed in int32
INT8_SUMS = 128  # csrc/int8.h kSumParts: groups whose fp32 sum stands apart


@functools.cache
@modes.outside()
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        decade = (10.0 ** (i - 6)) * means
        values += decade.tolist() + (-decade).tolist()
    return tuple(sorted(values))


def dynamic_map(
    device: torch.device | str = "cpu",
) -> Tensor:  # (256,) fp32, ascending, in [-1, 1]
    """The signed 8-bit dynamic code of double quantization (Dettmers, arXiv 1511.04561 and 2110.02861).

    Seven decades 10^-6 .. 1; decade i holds 2^i means of a linear division of [0.1, 1], with both signs.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


def e8m0_values(code: Tensor) -> Tensor:
    """2^(code - 127) in fp32, exact; 255 is NaN (OCP MX specification 1.0)."""
    value = torch.ldexp(torch.ones_like(code, dtype=torch.float64), code.to(torch.int32) - 127)
    return torch.where(code == 255, torch.nan, value).to(torch.float32)


def effective_scales(qt: QuantTensor) -> Tensor | None:  # (N, groups) fp32
    """The fp32 scale of every group, second level applied; None without scales."""
    if qt.format.scale is None:
        return None
    scales = qt.tensors["scales"]
    if qt.format.scale == "e8m0":
        return e8m0_values(scales)
    if qt.format.scale == "e4m3":
        return scales.to(torch.float32) * qt.tensors["scales2"]
    if qt.format.scale == "dq8":
        flat = dynamic_map(qt.device)[scales.flatten().long()]
        factor = qt.tensors["scales2"].repeat_interleave(DQ_BLOCK)[: flat.numel()]
        return (flat * factor + qt.tensors["scales2_offset"]).view_as(scales)
    return scales.to(torch.float32)


def group_index(format: Format, k: int, device: torch.device) -> Tensor:  # (K,) int64
    """The group of each weight in a row of k."""
    return torch.arange(k, dtype=torch.int64, device=device) // (format.group or max(1, k))


def per_weight(terms: Tensor, format: Format, k: int) -> Tensor:  # (N, groups) -> (N, K) or (N, 1)
    """The term of each weight's group; with one group a column, to be broadcast."""
    if format.group is None or terms.shape[1] == 1:
        return terms
    # Half the time of an index.
    return terms[:, :, None].expand(-1, -1, format.group).flatten(1)[:, :k]


def code_values(
    codes: Tensor,  # (N, K) uint8
    format: Format,
    table: Tensor | None,  # the fitted table
) -> Tensor:  # (N, K) fp32
    """The value of every code before zero and scale."""
    index = codes.long()
    if table is None:
        return torch.tensor(format.values(), dtype=torch.float32, device=codes.device)[index]
    if format.table_scope == "tensor":
        return table[index]
    if format.table_scope == "row":
        return table.gather(1, index)
    rows = torch.arange(codes.shape[0], dtype=torch.int64, device=codes.device).unsqueeze(1)
    return table[rows, group_index(format, codes.shape[1], codes.device), index]


def dequantize(qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:  # (N, K)
    """The weight in fp32, rounded once to `dtype`."""
    return dequantize_rows(qt, slice(None), effective_scales(qt)).to(dtype)


def dequantize_rows(
    qt: QuantTensor,
    rows: slice,
    scales: Tensor | None,  # (N, groups) fp32, of all rows
) -> Tensor:  # (R, K) fp32
    """Some rows of the weight."""
    table = qt.table
    if table is not None and qt.format.table_scope != "tensor":
        table = table[rows]
    codes = packing.unpack_codes(qt.tensors["codes"][rows], qt.format, qt.shape[1])
    weight = apply_scales(
        code_values(codes, qt.format, table),
        qt.format,
        None if scales is None else scales[rows],
        None if qt.zeros is None else qt.zeros[rows],
    )
    if qt.outlier_columns is None or qt.outlier_values is None:
        return weight
    return add_outliers(weight, qt.outlier_columns[rows], qt.outlier_values[rows])


def add_outliers(
    weight: Tensor,  # (N, K) fp32
    columns: Tensor,  # (N, P) int32
    values: Tensor,  # (N, P)
) -> Tensor:  # (N, K) fp32
    """weight + S, where S[n, columns[n, i]] = values[n, i] and 0 elsewhere."""
    return weight.scatter_add(1, columns.long(), values.to(weight.dtype))


def outlier_product(
    x: Tensor,  # (M, K)
    columns: Tensor,  # (N, P) int32
    values: Tensor,  # (N, P)
) -> Tensor:  # (M, N), dtype of x
    """x S^T in the dtype of x."""
    n, count = columns.shape  # bags by their offsets, as P = 0 makes them empty
    if not x.shape[0]:  # which embedding_bag does not take
        return x.new_empty(0, n)
    offsets = torch.arange(n, dtype=torch.int64, device=columns.device) * count
    weights = values.to(x.dtype).flatten()
    return F.embedding_bag(
        columns.flatten(), x.t().contiguous(), offsets, mode="sum", per_sample_weights=weights
    ).t()


def apply_scales(
    values: Tensor,  # (N, K) fp32
    format: Format,
    scales: Tensor | None,  # (N, groups) fp32
    zeros: Tensor | None,  # (N, groups)
) -> Tensor:
    """scale * (value - zero), or scale * value + zero for zero "min"."""
    if scales is None:
        return values
    scale = per_weight(scales, format, values.shape[1])
    if zeros is None:
        return scale * values
    zero = per_weight(zeros.to(torch.float32), format, values.shape[1])
    return scale * values + zero if format.zero == "min" else scale * (values - zero)


def quantize_int8(
    x: Tensor,  # (M, K) float
    group: int | None = None,
    scale: Tensor | None = None,  # (M,) fp32
) -> tuple[Tensor, Tensor]:  # (M, K) int8, and fp32 (M,), or (M, groups) with `group`
    """Symmetric int8: scale = absmax / 127 and q = round(x * min(127 / absmax, largest fp32)), ties to even.

    A group whose absmax is not finite gets q = 0 and a scale that is not finite either. With a given scale,
    q = round(x * (1 / scale)) saturates to -127 .. 127; a row with NaN has q = 0 there and the scale NaN.
    """
    x = x.float()
    m, k = x.shape
    if scale is not None:
        q = (x * (1 / scale)[:, None]).clamp(-127, 127)
        return q.nan_to_num(0).round().to(torch.int8), scale.masked_fill(
            x.isnan().any(1), torch.nan
        )
    groups = -(-k // (group or k))
    padded = F.pad(x, (0, groups * (group or k) - k)).view(m, groups, group or k)
    absmax = padded.abs().amax(-1)
    # A tensor: 127 / absmax would multiply 127 with the rounded reciprocal.
    top = torch.full_like(absmax, 127)
    inverse = (top / absmax).clamp(max=torch.finfo(torch.float32).max)
    good = absmax.isfinite() & (absmax > 0)
    q = torch.where(good[..., None], padded * inverse[..., None], 0.0).round().clamp(-127, 127)
    scales = absmax / top
    return q.to(torch.int8).flatten(1)[:, :k], scales[:, 0] if group is None else scales


def quantize_binary(x: Tensor) -> tuple[Tensor, Tensor]:  # (M, K) uint8, (M,) fp32
    """x is about scale * (2 * code - 1): code 1 where x >= 0, and the mean of |x|, summed in fp32 in any order."""
    x = x.float()
    return (x >= 0).to(torch.uint8), x.abs().mean(1)


def binary_linear(
    codes_x: Tensor,  # (M, K) uint8, 0 or 1
    x_scales: Tensor,  # (M,) fp32
    codes: Tensor,  # (N, K) uint8
    format: Format,  # its table is (-1, 1)
    scales: Tensor | None,  # (N, groups) fp32
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (M, N) fp32
    """`int8_linear` with the signs 2 * code - 1 for q."""
    signs = codes_x.to(torch.int8) * 2 - 1
    return int8_linear(signs, x_scales, codes, format, scales, None, None, bias)


def table_int8(values: Tensor, step: float | None) -> tuple[Tensor, Tensor]:
    """The table as integers in -128 .. 127 (fp32) and its step: table / step to nearest even, 0 if not finite.

    Without a step it is the largest finite |value| / 127, so that no finite value moves by more than half of that.
    """
    finite = torch.where(values.isfinite(), values, 0.0)
    if step is None:
        top = finite.abs().max() / 127
        made = torch.where(top > 0, top, torch.ones_like(top))
    else:
        made = values.new_tensor(step)
    return (finite / made).clamp(-128, 127).round(), made


def int8_linear(
    q: Tensor,  # (M, K) int8
    x_scales: Tensor,  # (M,) or (M, groups) fp32
    codes: Tensor,  # (N, K) uint8
    format: Format,
    scales: Tensor | None,  # (N, groups) fp32
    zeros: Tensor | None,  # (N, groups)
    table: Tensor | None,  # the fitted table
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (M, N) fp32
    """Products with int8 activations, bit for bit as the kernels compute them.

    A group of more than 65536 weights counts as several with its scale and zero, each of so many but for the last.
    For each group in order: the sum of q * (T - zero) is exact, T the table as int8 and zero an integer; it is rounded
    once to fp32 and multiplied by the weight's scale. A float zero enters as scale * (sum - zero * sum q), "min" as
    scale * sum + zero * sum q. The result, times the group's scale of x if there is one, is added to y. Then y is
    multiplied by the product of the row's scale of x (if it has one) and the table's step, and the bias is added. Each
    of these operations is fp32 and rounds once. Of many groups, 128 at a time are summed apart: y is the sum of those
    sums, in order.
    """
    m, k = q.shape
    if table is None:
        table = torch.tensor(format.values(), dtype=torch.float32, device=q.device)
    table_step = torch.ones((), dtype=torch.float32, device=q.device)
    if format.codec != "affine":
        exact = format.activation != "int8_table"
        table, table_step = table_int8(table, format.int8_step if exact else None)
    weight = table.double()[codes.long()]
    y = torch.zeros(m, codes.shape[0], dtype=torch.float32, device=q.device)
    size = format.group or k
    parts = (
        (g, slice(start, min(start + INT8_PART, (g + 1) * size, k)))
        for g in range(format.num_groups(k))
        for start in range(g * size, min((g + 1) * size, k), INT8_PART)
    )
    total = torch.zeros_like(y)
    for i, (g, columns) in enumerate(parts):
        if i % INT8_SUMS == 0:
            total, y = total + y, torch.zeros_like(y)
        w, x = weight[:, columns], q[:, columns].double()
        zero = None if zeros is None else zeros[:, g].float()
        if zero is not None and format.zero == "int":
            w, zero = w - zero[:, None].double(), None
        term = (x @ w.T).float()
        scale = (
            torch.ones((), dtype=torch.float32, device=q.device) if scales is None else scales[:, g]
        )
        if zero is None:
            term = scale * term
        else:
            shift = zero * x.sum(1).float()[:, None]
            term = scale * term + shift if format.zero == "min" else scale * (term - shift)
        y = y + (term if x_scales.dim() == 1 else term * x_scales[:, g, None])
    y = total + y
    factor = table_step if x_scales.dim() == 2 else (x_scales * table_step)[:, None]
    y = y * factor
    return y if bias is None else y + bias.float()


def requantize(y: Tensor, scale: float) -> Tensor:
    """y * (1 / scale) in fp32, to nearest even, saturated to -128 .. 127; int8 has no NaN, which becomes 0."""
    inverse = 1 / torch.tensor(scale, dtype=torch.float32, device=y.device)
    return (y * inverse).clamp(-128, 127).nan_to_num(0).round().to(torch.int8)


def linear(
    x: Tensor,  # (..., K)
    qt: QuantTensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    round_table_to: torch.dtype | None = None,
) -> Tensor:  # (..., N), dtype of x
    """x W^T + bias in float64, rounded once to the dtype of x; by `int8_linear` if the format wants int8 activations.

    `round_table_to=torch.bfloat16` states what a kernel that multiplies in bf16 computes: the table entry, never
    the product with the scale, is rounded to bf16. Integers of up to 8 bits, fp4, fp8 and bf16 tables are unaffected.
    Outliers multiply x as it is given, never as int8.
    """
    columns, outliers = qt.outlier_columns, qt.outlier_values
    if qt.format.activation is not None:
        q, x_scales = quantize_int8(x.reshape(-1, x.shape[-1]))
        weight = (qt.unpack(), qt.format, effective_scales(qt), qt.zeros, qt.table)
        y = int8_linear(q, x_scales, *weight, bias)
        if columns is not None and outliers is not None:
            y = y + outlier_product(x.reshape(-1, x.shape[-1]).double(), columns, outliers).float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    values = code_values(qt.unpack(), qt.format, qt.table)
    if round_table_to is not None:
        values = values.to(round_table_to).to(torch.float32)
    w = apply_scales(values, qt.format, effective_scales(qt), qt.zeros)
    if columns is not None and outliers is not None:
        w = add_outliers(w, columns, outliers)
    y = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    return y.to(x.dtype)


def embedding(indices: Tensor, qt: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the dequantized weight, (*indices.shape, K)."""
    return dequantize(qt, dtype)[indices]


def apply_epilogue(
    y: Tensor, activation: str | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    """activation(y) + residual, or activation(gate) * y + residual, in the dtype of y."""
    acting = y if gate is None else gate.to(y.dtype)
    if activation == "gelu_tanh":
        acting = F.gelu(acting, approximate="tanh")
    elif activation is not None:
        acting = getattr(F, activation)(acting)
    y = acting if gate is None else acting * y
    return y if residual is None else y + residual.to(y.dtype)
