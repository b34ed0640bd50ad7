"""What a call of the op costs above an empty torch op: a 64 x 64 layer, one row of x, under inference_mode.

The empty op has the signature of `lowbit::linear` and returns a tensor made beforehand, so that the difference is the
work of this library: its checks, the lookup of the kernel, the allocation of y and the product itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lowbit.methods import quantize
from lowbit.ops.terms import matrix

N = 64
CALLS, ROUNDS = 2000, 15


def overhead() -> dict[str, Any]:
    """Median nanoseconds of a call of the empty op and of `lowbit::linear`, in turn."""
    library = torch.library.Library("lowbit_bench", "DEF")
    schema = str(torch.ops.lowbit.linear.default._schema).partition("(")[2]
    library.define(f"empty({schema}")
    y = torch.empty(1, N)
    library.impl("empty", lambda *_: y, "CPU")
    w = matrix(quantize(torch.randn(N, N), "int4_g32"))
    x = torch.randn(1, N)
    arguments = (x, *w, None)
    calls: dict[str, Callable[..., object]] = {
        "empty_ns": torch.ops.lowbit_bench.empty.default,
        "op_ns": torch.ops.lowbit.linear.default,
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter_ns()
                for _ in range(CALLS):
                    call(*arguments)
                taken[name].append((time.perf_counter_ns() - start) / CALLS)
    result: dict[str, Any] = {name: statistics.median(times) for name, times in taken.items()}
    return {**result, "n": N, "k": N, "m": 1, "threads": threads, "target_ns": 3000}
