"""Times of products on a GPU: every kernel beside torch and other libraries, and every way in which the CUDA kernels
could compute them; see gpu.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from gpu_kernels import PEERS, TOLERANCE, Kernel, error, ours
from gpu_lines import Line, best
from gpu_timing import replay_microseconds
from torch import Tensor

from lowbit.backends.cuda import CUDA, weights
from lowbit.ops.terms import terms

# Replays for a candidate, of which there are dozens for each product.
_REPLAYS = 8


def microseconds(kernel: Kernel, x: Tensor, replays: int | None = None) -> list[float]:
    """Times of one product, from replays of a graph of all copies."""
    for call in kernel.calls[:2]:
        call(x)
    graph = [lambda: [call(x) for call in kernel.calls]]
    taken = replay_microseconds(*graph) if replays is None else replay_microseconds(*graph, replays)
    return [us / len(kernel.calls) for us in taken]


def times(kernel: Kernel, m: int, replays: int | None = None) -> Line:
    """Quartiles of the time of a product with m rows of x, if it is right."""
    n, k = kernel.weight.shape
    x = torch.randn(m, k, device=kernel.weight.device, dtype=torch.bfloat16)
    about = {"name": kernel.name, "n": n, "k": k, "m": m, "bytes": kernel.nbytes}
    if not (wrong := error(kernel, x)) <= TOLERANCE:
        return {**about, "failed": f"relative error {wrong:.3g}"}
    low, us, high = statistics.quantiles(microseconds(kernel, x, replays), n=4)
    return {**about, "error": wrong, "us": us, "low_us": low, "high_us": high}


def with_config(kernel: Kernel, config: weights.Config) -> Kernel:
    """A kernel of ours that computes in another way than the chosen one."""

    def calling(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        (w,) = call.__defaults__ or ()  # type: ignore[attr-defined]  # of `gpu_kernels.ours`
        operands, _ = terms(w)
        return lambda x: CUDA.linear(x, operands, None, config=config)

    return Kernel(kernel.name, kernel.nbytes, kernel.weight, [calling(c) for c in kernel.calls])


def candidates(kernel: Kernel, m: int, seconds: float) -> Iterator[Line]:
    """The three fastest ways of the CUDA kernels for m rows, of those that `seconds` suffice for, and what failed."""
    (w,) = kernel.calls[0].__defaults__ or ()  # type: ignore[attr-defined]
    operands, _ = terms(w)
    configs = weights.candidates(operands, m)
    end, timed = time.monotonic() + seconds, []
    for config in configs:
        if time.monotonic() > end:
            break
        try:
            timed.append(
                {**times(with_config(kernel, config), m, _REPLAYS), "config": list(config)}
            )
        except RuntimeError as e:  # what one cannot run says nothing of the others
            yield {"name": kernel.name, "m": m, "config": list(config), "failed": str(e)[:300]}
    tried = {"tried": len(timed), "of": len(configs)}
    yield from ({**line, **tried} for line in timed if "failed" in line)
    yield from ({**line, **tried, "place": i} for i, line in enumerate(best(timed)))


def sweep(
    shapes: list[tuple[int, int]],
    names: list[str],
    families: list[str],
    rows: list[int],
    candidate_seconds: float,
) -> Iterator[Line]:
    """Every kernel on every shape, the first format and M of all shapes before the others: its times, or what was
    wrong. With `candidate_seconds` the other ways of the CUDA kernels follow.
    """
    for n, k in shapes:
        weight = torch.randn(n, k, device="cuda") * 0.02
        kinds = [("peer", p) for p in PEERS] + [(f, name) for name in names for f in families]
        for family, name in kinds:
            try:
                kernel = PEERS[name](weight) if family == "peer" else ours(weight, name, family)
                for m in rows:
                    yield times(kernel, m)
                    if family == "cuda" and candidate_seconds > 0:
                        yield from candidates(kernel, m, candidate_seconds)
                del kernel
            except Exception as e:  # of another library, on a shape that it does not take, say
                if family != "peer":
                    raise
                yield {"name": name, "n": n, "k": k, "failed": str(e)[:300]}
            torch.cuda.empty_cache()
