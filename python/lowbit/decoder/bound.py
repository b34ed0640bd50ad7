"""A linear with its arguments prepared and checked once, for calls whose set-up would dominate.

Every call reads the same x, weight and bias and writes the same `out`, all in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.backends.cpu import requests, weights
from lowbit.layouts import KernelWeight
from lowbit.ops.linear import linear


def bind_linear(
    x: Tensor,  # (M, K)
    weight: KernelWeight,  # (N, K)
    out: Tensor,  # (M, N)
    bias: Tensor | None = None,  # (N,)
) -> Callable[[], object]:
    """Returns a call without arguments that sets `out` to x W^T + bias.

    The tensors are kept alive by the call. `bias` may change between calls, and may be a vector
    that is added for another reason (a residual, when M = 1). `out` must not overlap the other
    tensors. The number of threads is torch's now. There are no gradients.

    Raises:
        TypeError, ValueError: as `lowbit.linear`; or a tensor is not contiguous, or out has another
            shape or dtype.
    """
    with torch.no_grad():
        # All checks of the op.
        y = linear(x, weight, bias)
    if out.shape != y.shape or out.dtype != y.dtype or out.device != y.device:
        raise ValueError(
            f"out must be {y.dtype} of shape {tuple(y.shape)} on {y.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    for name, t in (("x", x), ("out", out), ("bias", bias)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    if not requests.reads(weight.layout) or weight.format.more_terms:
        return lambda: out.copy_(linear(x, weight, bias))
    return weights.bind_linear(x, weight.operands, bias, out)
