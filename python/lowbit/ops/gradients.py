"""Gradients of a quantized weight with respect to its scales, float zeros and table.

With W = scale * (T[code] - zero), or scale * T[code] + zero for zero "min", and dW its gradient:
    dscale[n, g] = sum over k in g of dW * (T - zero), or of dW * T
    dzero[n, g]  = -scale * sum over k in g of dW, or the sum alone
    dT[e]        = sum over the members of entry e of scale * dW
Each result lies as its operand does (`layouts/`); padded lanes have gradient 0. All of it is plain torch and can be
differentiated, so that second derivatives exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import layouts, modes, packing, reference
from lowbit.formats import Format
from lowbit.layouts import Operands


def dequantize(w: Operands, dtype: torch.dtype) -> Tensor:  # (N, K)
    """What lowbit::dequantize computes, bit for bit; differentiable in scales, zeros and table."""
    values = _values(_codes(w), w.table, w)
    return reference.apply_scales(values, w.format, *layouts.group_terms(w)).to(dtype)


def weight_tangent(
    w: Operands, of_scales: Tensor | None, of_zeros: Tensor | None, of_table: Tensor | None
) -> Tensor:  # (N, K) fp32
    """How the weight moves with tangents of scales, zeros and table: W is linear in each of them."""
    f, unpacked = w.format, _codes(w)
    values = _values(unpacked, w.table, w)
    moved = torch.zeros_like(values)
    if of_table is not None:
        moved = moved + _values(unpacked, of_table, w)
    scales, zeros = layouts.group_terms(w)
    moved = reference.apply_scales(moved, f, scales, _rows(of_zeros, w))
    if of_scales is None:
        return moved
    zeros = None if f.zero == "min" else zeros
    return moved + reference.apply_scales(values, f, _rows(of_scales, w), zeros)


def codebook_grad(
    grad_weight: Tensor,  # (N, K) fp32
    weight: Operands,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scales, zeros and table; an empty tensor in place of one that is not wanted.

    Raises:
        ValueError: a gradient is wanted of an operand that the weight lacks, or of an integer zero.
    """
    f, (want_scales, want_zeros, want_table) = weight.format, wanted
    for name, want in zip(("scales", "zeros", "table"), wanted, strict=True):
        operand = getattr(weight, name)
        if want and (operand is None or not operand.is_floating_point()):
            raise ValueError(
                f"format {f.name!r} has no floating-point {name}, so no gradient of it"
            )
    if want_table and not f.fitted and f.codec != "lut":
        raise ValueError(
            f"table of format {f.name!r} is fixed by its codec {f.codec!r}: no gradient"
        )
    unpacked = _codes(weight)
    scales, zeros = layouts.group_terms(weight)
    grads = [grad_weight.new_empty(0) for _ in range(3)]
    if want_scales:
        values = _values(unpacked, weight.table, weight)
        if zeros is not None and f.zero != "min":
            values = values - zeros[:, reference.group_index(f, weight.k, zeros.device)]
        grads[0] = _as_operand(_group_sum(grad_weight * values, f), weight.scales, weight)
    if want_zeros:
        grad = _group_sum(grad_weight, f)
        grad = grad if f.zero == "min" or scales is None else -scales * grad
        grads[1] = _as_operand(grad, weight.zeros, weight)
    if want_table:
        grad = reference.apply_scales(grad_weight, f, scales, None)
        grad = _entry_sum(grad, unpacked, f, layouts.chosen_tables(weight))
        grads[2] = layouts.find(weight.layout).pack_table(grad, f)
    return grads[0], grads[1], grads[2]


def _values(codes: Tensor, table: Tensor | None, weight: Operands) -> Tensor:  # (N, K) fp32
    chosen = layouts.chosen_tables(weight)
    return reference.code_values(codes, weight.format, _table(table, weight), chosen)[:, : weight.k]


@modes.outside()
def _codes(weight: Operands) -> Tensor:  # as `packing.unpack_codes` gives them
    (n, k), f = weight.shape, weight.format
    packed = layouts.find(weight.layout).unpack(weight.codes, f, n, k)
    return packing.unpack_codes(packed, f, k)


def _rows(terms: Tensor | None, weight: Operands) -> Tensor | None:  # (N, groups) fp32
    if terms is None:
        return None
    return layouts.find(weight.layout).to_rows(terms, weight.shape[0]).float()


def _table(table: Tensor | None, weight: Operands) -> Tensor | None:
    # That of integers may be centred, as their zeros.
    if table is None or weight.format.codec == "affine":
        return None
    return layouts.find(weight.layout).unpack_table(table, weight.format, weight.shape[0])


def _as_operand(grad: Tensor, operand: Tensor | None, weight: Operands) -> Tensor:
    grad = layouts.find(weight.layout).from_rows(grad)
    return grad if operand is None else grad.to(operand.dtype)


def _group_sum(values: Tensor, format: Format) -> Tensor:  # (N, K) -> (N, groups)
    n, k = values.shape
    index = reference.group_index(format, k, values.device)
    return values.new_zeros(n, format.num_groups(k)).index_add(1, index, values)


def _entry_sum(values: Tensor, codes: Tensor, format: Format, chosen: Tensor | None) -> Tensor:
    """Sums (N, K) values by code, within the scope of a table."""
    n, k = values.shape
    entries, index = 2**format.bits, codes.long()
    if format.dim > 1:
        vectors = F.pad(values, (0, -k % format.dim)).view(-1, format.dim)
        sums = values.new_zeros(entries, format.dim)
        return sums.index_add(0, index.flatten(), vectors)
    if format.table_scope == "group":
        groups = format.num_groups(k)
        index = index + reference.group_index(format, k, codes.device) * entries
        sums = values.new_zeros(n, groups * entries).scatter_add(1, index, values)
        return sums.view(n, groups, entries)
    if chosen is not None:
        index = index + reference.per_weight(chosen, format, k) * entries
        sums = values.new_zeros(n, 2 * entries).scatter_add(1, index, values)
        return sums.sum(0).view(2, entries)
    # Rows first: one running sum over the whole weight would lose digits.
    sums = values.new_zeros(n, entries).scatter_add(1, index, values)
    return sums if format.table_scope == "row" else sums.sum(0)
