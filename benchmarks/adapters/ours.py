"""lowbit's own formats."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.base import Candidate, eager, group_of, num_copies
from lowbit.explanation import explain_request
from lowbit.formats import as_format
from lowbit.layouts import KernelWeight
from lowbit.methods import quantize
from lowbit.ops.linear import linear
from lowbit.ops.terms import kernel_weight
from lowbit.weights.quantized import QuantTensor


def lowbit(weight: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> Candidate:
    """`lowbit.linear` in a named format; formats with groups of 128 take the largest that divides K."""
    format = as_format(name)
    if format.group == 128:
        base = format.with_activation(None).name.split("_g")[0]
        whole = as_format(f"{base}_g{group_of(weight.shape[1])}")
        format = whole.with_activation(format.activation, format.activation_group)
    qt = quantize(weight, format)
    values = qt.dequantize()
    first = kernel_weight(qt)
    copies = [_rolled(qt, i) for i in range(num_copies(first.nbytes))]
    calls = [lambda x, w=w: linear(x, w) for w in copies]
    activation = "int8" if format.activation else str(dtype).removeprefix("torch.")
    bits = 8 * first.nbytes / weight.numel()
    label = f"lowbit {format.name}" + ("" if dtype == torch.bfloat16 else f" {activation}")
    return eager(label, bits, activation, values, calls, dtype)


def selected(candidate_format: str, shape: tuple[int, int], m: int, dtype: torch.dtype) -> str:
    """The kernel that runs."""
    format = as_format(candidate_format)
    return explain_request(format, *shape, m, dtype).selected


def _rolled(qt: QuantTensor, i: int) -> KernelWeight:
    """The weight with its rows rotated by i."""
    return kernel_weight(qt.map(lambda t: t.roll(i, 0) if t.dim() >= 2 else t))
