"""pytest-benchmark suite of `lowbit.linear` and torch's dense linear over the shapes of models.

pytest benchmarks --benchmark-only -k "4096x4096 and M1-"     one shape and M
pytest benchmarks --benchmark-disable -k 192x576              only the checks

Every case is checked against float64 before it is timed. A round is one pass over copies of the weight that do not fit
in twice the last-level cache; `us` in extra_info is its median divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from adapters import ours, torch_ops
from adapters.base import Candidate
from shapes import MODELS, ROWS, THREADS

FORMATS = (
    "int4", "nf4", "kmeans4_pr", "int3", "kmeans3", "int2", "ternary_trits", "binary", "int8", "e4m3",
    "int4_g128_a8", "nf4_a8t",
)  # fmt: skip
SHAPES = tuple(dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """A normal (N, K) weight."""
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.fixture(scope="module", params=("dense", *FORMATS))
def candidate(request: pytest.FixtureRequest, weight: torch.Tensor) -> Candidate:
    """The weight in a format, or dense bf16."""
    if request.param == "dense":
        return torch_ops.dense(weight, torch.bfloat16)
    return ours.lowbit(weight, request.param)


@pytest.fixture(scope="module", params=THREADS, ids=lambda t: f"{t}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """OpenMP threads of torch and lowbit."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("m", ROWS, ids=lambda m: f"M{m}-")
def test_linear(benchmark, candidate: Candidate, threads: int, m: int) -> None:
    """One pass of y = x W^T over the copies of the weight."""
    k = candidate.weight.shape[1]
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    error = candidate.check(x)
    benchmark.group = f"{candidate.weight.shape[0]}x{k} M={m} {threads} threads"
    benchmark.extra_info.update(
        name=candidate.name, bits=candidate.bits, error=error, copies=candidate.copies
    )
    benchmark(candidate.prepare(x))
    if benchmark.stats is not None:
        benchmark.extra_info["us"] = benchmark.stats.stats.median / candidate.copies * 1e6
