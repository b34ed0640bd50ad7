"""The measurement behind `lowbit bench`: linear with quantized weights beside torch's dense linear.

Weights rotate through more memory than twice the last-level cache, as the layers of a model do, so
that none is found in a cache. A case is checked against `reference/` before it is timed; its calls
alternate with the dense ones, so that both see the same machine, and times are medians.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import reference
from lowbit.backends.cpu.requests import kernels
from lowbit.explanation import explain
from lowbit.formats import Format, as_format
from lowbit.layouts import KernelWeight
from lowbit.methods import quantize
from lowbit.ops.linear import linear
from lowbit.ops.terms import kernel_weight
from lowbit.weights.quantized import QuantTensor

_UNKNOWN_CACHE = 64 << 20
_MIN_CALLS, _MAX_CALLS = 20, 2000


@dataclass(frozen=True)
class Result:
    """One case: an (m, k) x against an (n, k) weight.

    Attributes:
        kernel: what ran.
        us: median time of a call.
        gb_per_second: packed weight, x and y, read and written once.
        gflops: 2 m n k operations.
        dense_us: median time of F.linear in the dtype of x.
        speedup: dense_us / us.
    """

    format: str
    dtype: str
    m: int
    n: int
    k: int
    kernel: str
    us: float
    gb_per_second: float
    gflops: float
    dense_us: float
    speedup: float


def bench(
    formats: Iterable[Format | str],
    shapes: Iterable[tuple[int, int]],
    rows: Iterable[int],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.2,
) -> list[Result]:
    """Times every format at every (n, k) shape and number of rows of x.

    Args:
        formats: formats or their names.
        shapes: (n, k) of the weights.
        rows: numbers of rows of x.
        dtype: of x and of the dense weight: fp32, bf16 or fp16.
        seconds: time for each median.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
        ValueError, TypeError: an argument is out of range.
    """
    chosen = [as_format(f) for f in formats]
    counts = list(rows)
    if not 0 < seconds < math.inf or any(m < 1 for m in counts):
        raise ValueError(
            f"rows and seconds must be positive and finite, got {counts} and {seconds}"
        )
    results = []
    for n, k in shapes:
        if n < 1 or k < 1:
            raise ValueError(f"shapes must be positive, got ({n}, {k})")
        seeded = torch.Generator("cpu").manual_seed(0)
        weight = torch.randn(n, k, generator=seeded, dtype=torch.float32, device="cpu")
        dense = _copies(weight.to(dtype), weight.numel() * dtype.itemsize)
        for format in chosen:
            qt = quantize(weight, format)
            copies = _rotation(kernel_weight(qt))
            for m in counts:
                seeded.manual_seed(m)
                x = torch.randn(m, k, generator=seeded, dtype=torch.float32, device="cpu").to(dtype)
                selected = explain(x, copies[0]).selected
                _check(x, qt, copies[0], selected)
                us, dense_us = _median_us(((_linear(x), copies), (_dense(x), dense)), seconds)
                results.append(_result(x, copies[0], selected, us, dense_us))
    return results


def _linear(x: Tensor) -> Callable[[KernelWeight], object]:
    return lambda w: linear(x, w)


def _dense(x: Tensor) -> Callable[[Tensor], object]:
    return lambda w: F.linear(x, w)


def _copies(t: Tensor, nbytes: int) -> list[Tensor]:
    return [t.clone() for _ in range(_num_copies(nbytes))]


def _num_copies(nbytes: int) -> int:
    return 2 + 2 * cache_bytes() // max(1, nbytes)


def _rotation(w: KernelWeight) -> list[KernelWeight]:
    return [w.map(Tensor.clone) for _ in range(_num_copies(w.nbytes))]


def _check(x: Tensor, qt: QuantTensor, w: KernelWeight, kernel: str) -> None:
    """Raises RuntimeError if the kernel is wrong by more than rounding."""
    in_bf16 = any(row["name"] == kernel and row["compute"] == "bf16" for row in kernels())
    if qt.format.activation is not None and not qt.format.more_terms:
        if not torch.equal(linear(x, w), reference.linear(x, qt)):
            raise RuntimeError(f"{kernel} is not exact on {qt}")
        return
    exact = reference.linear(x.double(), qt, round_table_to=torch.bfloat16 if in_bf16 else None)
    got = linear(x, w).double()
    # sum |x w| <= |x| |w|; each of 2 k roundings to fp32 loses 2^-24 of it, and y is rounded once.
    # A zero point doubles the terms. Anything worse is a wrong weight, not rounding.
    size = x.double().norm(dim=1, keepdim=True) * qt.dequantize().double().norm(dim=1)
    bound = 8 * qt.shape[1] * 2**-24 * size + torch.finfo(x.dtype).eps * exact.abs()
    if not bool(((got - exact).abs() <= bound).all()):
        raise RuntimeError(
            f"{kernel} is wrong on {qt}: largest error {float((got - exact).abs().max()):.3g}"
        )


def _median_us(
    rivals: Sequence[tuple[Callable[[Any], object], Sequence[Any]]], seconds: float
) -> list[float]:
    """Median time of each (call, weights), one call of each at a time, weights in rotation."""
    rings = [(call, itertools.cycle(weights)) for call, weights in rivals]
    times: list[list[float]] = [[] for _ in rings]
    with torch.inference_mode():
        for call, ring in rings * 3:
            call(next(ring))
        end = time.perf_counter() + seconds * len(rings)
        while len(times[0]) < _MIN_CALLS or (
            len(times[0]) < _MAX_CALLS and time.perf_counter() < end
        ):
            for (call, ring), taken in zip(rings, times, strict=True):
                w = next(ring)
                start = time.perf_counter()
                call(w)
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) * 1e6 for taken in times]


def _result(x: Tensor, w: KernelWeight, kernel: str, us: float, dense_us: float) -> Result:
    (n, k), m = w.shape, x.shape[0]
    moved = w.nbytes + x.nbytes + m * n * x.element_size()
    return Result(
        format=w.format.name,
        dtype=str(x.dtype).removeprefix("torch."),
        m=m,
        n=n,
        k=k,
        kernel=kernel,
        us=us,
        gb_per_second=moved / us / 1e3,
        gflops=2 * m * n * k / us / 1e3,
        dense_us=dense_us,
        speedup=dense_us / us,
    )


def cache_bytes() -> int:
    """Size of the last-level cache of CPU 0, or 64 MiB where the system does not tell."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=_UNKNOWN_CACHE)
