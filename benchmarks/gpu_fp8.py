"""Products of FP8 matrices on a GPU, checked against float64 and timed beside torch's own; see gpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import replay_microseconds
from torch import Tensor

from lowbit import float8, fp8
from lowbit.backends.cuda import fp8_matmul as matmul_cuda
from lowbit.backends.triton import fp8_matmul as matmul_triton

# (M, N, K): square, a layer of a large model at prefill and at decode.
SHAPES = ((8192, 8192, 8192), (4096, 7168, 2048), (16, 28672, 8192), (64, 28672, 8192))
PAIRS = (("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"))
CHECKED_ROWS = 64
# fp32 sums of exact products; y is rounded to bf16 (2^-9 at most, 0.2 % rms).
TOLERANCE = 0.003
Call = Callable[[], Tensor]


def torch_call(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, kind: str) -> Call:
    """torch._scaled_mm, which has scales per tensor and per row."""
    if kind == "row":
        scale_b = scale_b.t()
    return lambda: torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16)


def microseconds(call: Call, copies: int = 4) -> float:
    """Median time of a call, several in one CUDA graph."""
    call()
    return statistics.median(replay_microseconds(lambda: [call() for _ in range(copies)])) / copies


def measure(families: list[str]) -> Iterator[dict[str, Any]]:
    """Time and TFLOP/s of each pairing of scales, or what was wrong with it."""
    for m, n, k in SHAPES:
        x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        dense_x, dense_w = x.bfloat16(), w.bfloat16()
        calls: dict[str, tuple[Call, Tensor | None]] = {
            "torch dense bf16": (lambda dx=dense_x, dw=dense_w: dx @ dw.t(), None)
        }
        for kind_a, kind_b in PAIRS:
            (a, scale_a), (b, scale_b) = (
                fp8.quantize(t, granularity=kind) for t, kind in ((x, kind_a), (w, kind_b))
            )
            rows = slice(0, CHECKED_ROWS)
            values = fp8.dequantize(a, scale_a)[rows].double()
            want = values @ fp8.dequantize(b, scale_b).double().t()
            operands = (float8.scaled(a, scale_a), float8.scaled(b, scale_b))
            arguments = (*operands, None, torch.bfloat16)
            backends = {"triton": matmul_triton, "cuda": matmul_cuda}
            for family in families:
                run = backends[family].scaled_mm
                calls[f"{family} {kind_a} x {kind_b}"] = (
                    lambda run=run, arguments=arguments: run(*arguments),
                    want,
                )
            if kind_a == kind_b:
                calls[f"torch {kind_a} x {kind_b}"] = (
                    torch_call(a, b, scale_a, scale_b, kind_a),
                    want,
                )
        for name, (call, want) in calls.items():
            about = {"name": name, "m": m, "n": n, "k": k}
            if want is not None:
                got = call()[:CHECKED_ROWS].double()
                wrong = float((got - want).norm() / want.norm())
                if not wrong <= TOLERANCE:
                    yield {**about, "failed": f"relative error {wrong:.3g}"}
                    continue
                about["error"] = wrong
            us = microseconds(call)
            yield {**about, "us": us, "tflops": 2 * m * n * k / us / 1e6}
