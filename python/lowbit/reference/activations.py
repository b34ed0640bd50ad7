"""Products with quantized activations, and what follows a product, in plain torch: bit for bit what kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import Format

Product: TypeAlias = Callable[[Tensor, Tensor, bool, Tensor, Tensor | None], Tensor]
INT8_PART = 65536  # csrc/core/int8_table.h kMaxInt8Group: weights whose products with int8 are summed in int32
INT8_SUMS = 128  # csrc/core/int8_table.h kSumParts: parts whose fp32 sum stands apart


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
    multiply: Product | None = None,
) -> Tensor:  # (M, N) fp32
    """`int8_linear` with the signs 2 * code - 1 for q."""
    signs = codes_x.to(torch.int8) * 2 - 1
    return int8_linear(signs, x_scales, codes, format, scales, None, None, bias, multiply)


def exact_product(
    q: Tensor,  # (M, K) int8, K at most INT8_PART
    table: Tensor,  # (entries,) fp32, integers in -128 .. 255
    shifted: bool,  # whether some are above 127
    codes: Tensor,  # (N, K) uint8
    zeros: Tensor | None,  # (N,) fp32, integers
) -> Tensor:  # (M, N) fp32
    """q (T[codes] - zeros)^T, exact before it is rounded once."""
    w = table.double()[codes.long()]
    w = w if zeros is None else w - zeros[:, None].double()
    return (q.double() @ w.T).float()


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
    x_scales: Tensor,  # (M,), (M, groups) or (M, ceil(K / format.activation_group)) fp32
    codes: Tensor,  # (N, K) uint8
    format: Format,
    scales: Tensor | None,  # (N, groups) fp32
    zeros: Tensor | None,  # (N, groups)
    table: Tensor | None,  # the fitted table
    bias: Tensor | None = None,  # (N,)
    multiply: Product
    | None = None,  # what computes the same as `exact_product`, which it is by default
) -> Tensor:  # (M, N) fp32
    """Products with int8 activations, bit for bit as the kernels compute them.

    A part is what a group of the weight and a block of x have in common, one of which divides the other; one of more
    than 65536 weights counts as several, each of so many but for the last. For each part in order: the sum of
    q * (T - zero) is exact, T the table as int8 and zero an integer; it is rounded once to fp32 and multiplied by the
    weight's scale. A float zero enters as scale * (sum - zero * sum q), "min" as scale * sum + zero * sum q. The
    result, times the block's scale of x if there is one, is added to y. Then y is multiplied by the product of the
    row's scale of x (if it has one) and the table's step, and the bias is added. Each of these operations is fp32 and
    rounds once. Of many parts, 128 at a time are summed apart: y is the sum of those sums, in order.
    """
    m, k = q.shape
    if table is None:
        table = torch.tensor(format.values(), dtype=torch.float32, device=q.device)
    table_step = torch.ones((), dtype=torch.float32, device=q.device)
    if format.codec != "affine":
        exact = format.activation != "int8_table"
        table, table_step = table_int8(table, format.int8_step if exact else None)
    shifted = format.codec == "affine" and max(format.values() or ()) > 127
    multiply = multiply or exact_product
    y = torch.zeros(m, codes.shape[0], dtype=torch.float32, device=q.device)
    size, blocks = format.group or k, x_scales.dim() == 2
    block = (format.activation_group or size) if blocks else k
    common = min(size, block, k)
    parts = (
        slice(start, min(start + INT8_PART, first + common, k))
        for first in range(0, k, common)
        for start in range(first, min(first + common, k), INT8_PART)
    )
    total = torch.zeros_like(y)
    for i, columns in enumerate(parts):
        g, b = columns.start // size, columns.start // block
        if i % INT8_SUMS == 0:
            total, y = total + y, torch.zeros_like(y)
        x = q[:, columns]
        zero = None if zeros is None else zeros[:, g].float()
        of_codes, zero = (zero, None) if format.zero == "int" else (None, zero)
        term = multiply(x, table, shifted, codes[:, columns], of_codes)
        scale = (
            torch.ones((), dtype=torch.float32, device=q.device) if scales is None else scales[:, g]
        )
        if zero is None:
            term = scale * term
        else:
            shift = zero * x.sum(1, dtype=torch.int32).float()[:, None]
            term = scale * term + shift if format.zero == "min" else scale * (term - shift)
        y = y + (term * x_scales[:, b, None] if blocks else term)
    y = total + y
    factor = table_step if blocks else (x_scales * table_step)[:, None]
    y = y * factor
    return y if bias is None else y + bias.float()


def requantize(y: Tensor, scale: float) -> Tensor:
    """y * (1 / scale) in fp32, to nearest even, saturated to -128 .. 127; int8 has no NaN, which becomes 0."""
    inverse = 1 / torch.tensor(scale, dtype=torch.float32, device=y.device)
    return (y * inverse).clamp(-128, 127).nan_to_num(0).round().to(torch.int8)


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
