"""Gradients of a quantized weight with respect to its scales, float zeros and table.

With W = scale * (T[code] - zero), or scale * T[code] + zero for zero "min", and dW its gradient:
    dscale[n, g] = sum over k in g of dW * (T - zero), or of dW * T
    dzero[n, g]  = -scale * sum over k in g of dW, or the sum alone
    dT[e]        = sum over the members of entry e of scale * dW
Each result lies as its operand does (`layouts.py`); padded lanes have gradient 0.
"""

from __future__ import annotations

from torch import Tensor

from lowbit import layouts, packing, reference
from lowbit.formats import Format
from lowbit.layouts import N16, Operands


def codebook_grad(
    grad_weight: Tensor,  # (N, K) fp32
    weight: Operands,
    want_scales: bool,
    want_zeros: bool,
    want_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scales, zeros and table; an empty tensor in place of one that is not wanted.

    Raises:
        ValueError: a gradient is wanted of an operand that the weight lacks, or of an integer zero.
    """
    f, k = weight.format, weight.shape[1]
    for name, wanted in (("scales", want_scales), ("zeros", want_zeros), ("table", want_table)):
        operand = getattr(weight, name)
        if wanted and (operand is None or not operand.is_floating_point()):
            raise ValueError(
                f"format {f.name!r} has no floating-point {name}, so no gradient of it"
            )
    if want_table and f.codec != "lut":
        raise ValueError(
            f"table of format {f.name!r} is fixed by its codec {f.codec!r}: no gradient"
        )
    codes = packing.unpack_codes(layouts.packed_codes(weight), f, k)
    scales, zeros = (_rows(t, weight) for t in (weight.scales, weight.zeros))
    grads = [grad_weight.new_empty(0) for _ in range(3)]
    if want_scales:
        values = reference.code_values(codes, f, layouts.table_of(weight))
        if zeros is not None and f.zero != "min":
            values = values - zeros[:, reference.group_index(f, k, zeros.device)]
        grads[0] = _as_operand(_group_sum(grad_weight * values, f), weight.scales, weight)
    if want_zeros:
        grad = _group_sum(grad_weight, f)
        grad = grad if f.zero == "min" or scales is None else -scales * grad
        grads[1] = _as_operand(grad, weight.zeros, weight)
    if want_table:
        grad = _entry_sum(reference.apply_scales(grad_weight, f, scales, None), codes, f)
        grads[2] = layouts.kernel_table(f, grad) if weight.layout == N16 else grad
    return grads[0], grads[1], grads[2]


def _rows(terms: Tensor | None, weight: Operands) -> Tensor | None:  # (N, groups) fp32
    if terms is None:
        return None
    return layouts.by_row(terms, layout=weight.layout, n=weight.shape[0]).float()


def _as_operand(grad: Tensor, operand: Tensor | None, weight: Operands) -> Tensor:
    grad = layouts.from_rows(grad, weight.layout)
    return grad if operand is None else grad.to(operand.dtype)


def _group_sum(values: Tensor, format: Format) -> Tensor:  # (N, K) -> (N, groups)
    n, k = values.shape
    index = reference.group_index(format, k, values.device)
    return values.new_zeros(n, format.num_groups(k)).index_add_(1, index, values)


def _entry_sum(values: Tensor, codes: Tensor, format: Format) -> Tensor:
    """Sums (N, K) values by code, within the scope of a table."""
    n, k = values.shape
    entries, index = 2**format.bits, codes.long()
    if format.table_scope == "group":
        groups = format.num_groups(k)
        index = index + reference.group_index(format, k, codes.device) * entries
        sums = values.new_zeros(n, groups * entries).scatter_add_(1, index, values)
        return sums.view(n, groups, entries)
    # Rows first: one running sum over the whole weight would lose digits.
    sums = values.new_zeros(n, entries).scatter_add_(1, index, values)
    return sums if format.table_scope == "row" else sums.sum(0)
