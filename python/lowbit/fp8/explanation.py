"""`explain`: which kernel `scaled_mm` runs, and why the others do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import _C
from lowbit.explanation import REFERENCE as REFERENCE_ROW
from lowbit.explanation import Explanation
from lowbit.explanation import Kernel as Row
from lowbit.fp8 import matmul, matmul_cpu, matmul_cuda, matmul_triton
from lowbit.fp8.granularity import Granularity


def explain(
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
    both = matmul.check((a, b, scale_a, scale_b, None), torch.float32)
    if requantize is not None:
        matmul.check_requantize(requantize)
    (m, k), n, device = a.shape, b.shape[0], a.device
    request = (
        f"fp8_scaled_mm {both[0].name} {both[1].name} M={m} N={n} K={k} on {device.type}"
        + f", y quantized by {requantize}" * (requantize is not None)
    )
    backend = matmul.backend_of(device, *both, m)
    if backend is matmul_cpu:
        return Explanation(request, _C.fp8_matmul_name(), _cpu_rows())
    if backend is matmul_cuda:
        return Explanation(request, matmul_cuda.NAME, (Row(matmul_cuda.NAME, None, None, None),))
    cuda = Row(matmul_cuda.NAME, None, None, matmul_cuda.obstacle(device, *both, m))
    if backend is not matmul_triton:
        triton = Row("triton_fp8_mm", None, None, "triton is not installed")
        return Explanation(request, REFERENCE_ROW, (cuda, triton))
    a, b, *_ = matmul.ready((a, b))
    quantized = matmul.fuses_quantize(backend, requantize)
    rows = triton_rows(a, b, *both, quantized)
    return Explanation(request, rows[-1].name, (cuda, *rows))


def _cpu_rows() -> tuple[Row, ...]:
    """Rows of `_C.kernels()`, the newest instruction set first."""
    chosen, active = _C.fp8_matmul_name(), _C.isa_active()

    def why(row: Any) -> str | None:
        if row["name"] == chosen:
            return None
        if not row["available"]:
            return f"this CPU has no {row['isa']}"
        return "a newer one runs" if row["isa"] in active else "LOWBIT_ISA excludes it"

    rows = (row for row in _C.kernels() if row["op"] == "fp8_scaled_mm")
    return tuple(Row(row["name"], None, None, why(row)) for row in rows)


def triton_rows(
    a: Tensor,  # (M, K), unit stride along K
    b: Tensor,  # (N, K), unit stride along K
    granularity_a: Granularity,
    granularity_b: Granularity,
    quantized: bool,
) -> tuple[Row, ...]:
    """The Triton kernel with TMA and, where that cannot be, with pointers; the last one runs."""
    group = matmul_triton.group_of(granularity_a, granularity_b)
    obstacle = matmul_triton.tma_obstacle(a, b, group)
    name = matmul_triton.describe(
        matmul_triton.choose(a, b, granularity_a, granularity_b, quantized)
    )
    runs = Row(name, None, None, None)
    return (runs,) if obstacle is None else (Row("triton_fp8_mm_tma", None, None, obstacle), runs)
