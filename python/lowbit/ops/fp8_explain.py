"""`fp8.explain`: which kernel `scaled_mm` runs, and why the others do not."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends import REFERENCE_ROW, Explanation, Row
from lowbit.backends import fp8 as backends
from lowbit.ops import fp8_matmul


def explain_fp8(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    requantize: str | None = None,
) -> Explanation:
    """Says which kernel `scaled_mm(a, b, scale_a, scale_b, requantize=requantize)` runs, and why the others do not.

    Args:
        a: (M, K); `scaled_mm` says what these may be. Values are not read.
        b: (N, K).
        scale_a, scale_b: their scales.
        requantize: None, "row" or "1x16".

    Returns:
        The kernel, newest instruction sets and fastest loads first; `str()` is a table. `lowbit.kernels()` has the rows
        of the CPU, of op "fp8_scaled_mm".

    Raises:
        TypeError, ValueError: as `scaled_mm`.
    """
    if a.device.type not in ("cpu", "cuda"):
        raise ValueError(f"a must be on a CPU or a CUDA device, got {a.device}")
    left, right = fp8_matmul.check(a, b, scale_a, scale_b, None, torch.float32)
    if requantize is not None:
        fp8_matmul.check_requantize(requantize)
    (m, k), n = a.shape, b.shape[0]
    request = (
        f"fp8_scaled_mm {left.granularity.name} {right.granularity.name} M={m} N={n} K={k} on {a.device.type}"
        + f", y quantized by {requantize}" * (requantize is not None)
    )
    backend, others = backends.product(left, right)
    quantized = backends.quantizing_product(left, right, requantize) is not None
    ready = fp8_matmul.ready(left), fp8_matmul.ready(right)
    kernels = (*others, *backend.explain(*ready, quantized))
    selected = next((name for name, why in kernels if why is None), REFERENCE_ROW)
    return Explanation(
        request, selected, tuple(Row(name, None, None, why) for name, why in kernels)
    )
