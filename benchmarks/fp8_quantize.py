"""`lowbit.fp8.quantize` beside the same in torch (absmax, division, clamp, cast), in turn, one JSON line for each case.

GB/s count x read once and q written once, whatever a candidate moves. Inputs rotate through more memory than the
caches; codes are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit import fp8
from lowbit.float8 import FLOAT8, GRANULARITIES, find_granularity

_ROTATED_BYTES = 128 << 20


def in_torch(x: Tensor, dtype: torch.dtype, granularity: str) -> tuple[Tensor, Tensor]:
    """Quantization as it is written with torch's operators; K is a multiple of the block."""
    g = find_granularity(granularity)
    f = FLOAT8[dtype]
    rows, k = x.shape
    block_rows, block_k = g.block(rows, k)
    blocks = x.view(rows // block_rows, block_rows, k // block_k, block_k)
    scale = blocks.abs().amax((1, 3), keepdim=True).float() / f.max
    q = (blocks / scale).clamp(-f.max, f.max).to(dtype).view(rows, k)
    return q, scale.view(g.scale_shape(rows, k))


def measure(granularity: str, x: Tensor, dtype: torch.dtype, seconds: float) -> dict[str, object]:
    """Median times of a call; those of torch are null for what it lacks."""
    inputs = [x.clone() for _ in range(max(1, _ROTATED_BYTES // (x.numel() * x.element_size())))]
    calls: dict[str, Callable[[Tensor], object]] = {
        "lowbit": lambda x: fp8.quantize(x, dtype, granularity),
        "transposed": lambda x: fp8.quantize(x, dtype, granularity, transposed=True),
        "stochastic": lambda x: fp8.quantize(x, dtype, granularity, rounding="stochastic", seed=1),
    }
    if granularity != "mx":
        calls["torch"] = lambda x: in_torch(x, dtype, granularity)
        ours, theirs = fp8.quantize(x, dtype, granularity)[0], in_torch(x, dtype, granularity)[0]
        if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            raise RuntimeError(f"{granularity}: the codes are not those of torch")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rotated = itertools.cycle(inputs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["lowbit"]) < 5:
        for name, call in calls.items():
            given = next(rotated)
            start = time.perf_counter()
            call(given)
            taken[name].append(time.perf_counter() - start)
    times = {name: statistics.median(t) for name, t in taken.items()}
    moved = x.numel() * (x.element_size() + 1)
    return {
        "granularity": granularity,
        "x": str(x.dtype),
        "shape": list(x.shape),
        "threads": torch.get_num_threads(),
        **{f"{name}_us": round(t * 1e6, 1) for name, t in times.items()},
        **{f"{name}_gb_per_second": round(moved / t / 1e9, 2) for name, t in times.items()},
        "speedup": round(times["torch"] / times["lowbit"], 2) if "torch" in times else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    x = torch.randn(arguments.rows, arguments.k).to(getattr(torch, arguments.dtype))
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for granularity in GRANULARITIES:
            result = measure(granularity, x, torch.float8_e4m3fn, arguments.seconds)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
