"""A linear with its arguments prepared and checked once, for calls whose set-up would dominate.

Every call reads the same x, weight and bias and writes the same `out`, all in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit import ops
from lowbit.backends import cpu
from lowbit.layouts import Operands


def bind_linear(
    x: Tensor,  # (M, K)
    weight: Operands,  # (N, K)
    out: Tensor,  # (M, N)
    bias: Tensor | None = None,  # (N,)
) -> Callable[[], object]:
    """Returns a call without arguments that sets `out` to x W^T + bias.

    The tensors are kept alive by the call. `bias` may change between calls, and may be a vector
    that is added for another reason (a residual, when M = 1). `out` must not overlap the other
    tensors. The number of threads is torch's now. There are no gradients.

    Raises:
        TypeError, ValueError: as `ops.linear`; or a tensor is not contiguous, or out has another
            shape or dtype.
    """
    with torch.no_grad():
        # All checks of the op.
        y = ops.linear(x, weight, bias)
    if out.shape != y.shape or out.dtype != y.dtype or out.device != y.device:
        raise ValueError(
            f"out must be {y.dtype} of shape {tuple(y.shape)} on {y.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    for name, t in (("x", x), ("out", out), ("bias", bias)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    if not cpu.reads(weight.layout) or weight.outlier_columns is not None:
        return lambda: out.copy_(ops.linear(x, weight, bias))
    w = weight
    assert w.table is not None
    return cpu.bind_linear(x, w.codes, w.scales, w.zeros, w.table, bias, out, w.format, *w.shape)
