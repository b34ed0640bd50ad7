"""Interleaved timing: candidates take turns in short blocks, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.base import Candidate
from torch import Tensor

# Thread pools spin for a while after a call (libgomp, onnxruntime, TBB); the pause lets the last one's end.
_PAUSE = 0.005


@dataclass(frozen=True)
class Time:
    """Of one product: median and quartiles of all passes, each divided by its copies."""

    us: float
    low_us: float
    high_us: float


def interleave(
    candidates: Sequence[Candidate], x: Tensor, rounds: int, seconds: float
) -> list[Time]:
    """Times every candidate on x: `rounds` blocks each, A B C A B C, of at least `seconds` and one pass.

    A pass before each block warms up; where blocks are single passes, before the first alone.
    """
    runs = [c.prepare(x) for c in candidates]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for candidate, run, taken in zip(candidates, runs, times, strict=True):
            time.sleep(_PAUSE)
            if turn == 0 or seconds > 0:
                run()
            end = time.perf_counter() + seconds
            while True:
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                taken.append((now - start) / candidate.copies * 1e6)
                if now >= end:
                    break
    return [_summary(taken) for taken in times]


def _summary(taken: list[float]) -> Time:
    low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
    return Time(middle, low, high)
