"""Times of what a CUDA graph holds; see gpu.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

REPLAYS = 25
_WARM_UP = 3


def replay_microseconds(run: Callable[[], object], replays: int = REPLAYS) -> list[float]:
    """Times of replays of a graph of `run`, which has been called before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    taken = []
    for _ in range(_WARM_UP + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3)
    return taken[_WARM_UP:]
