"""Which kernels a GPU gets where the CUDA kernels were built but cannot run: a module that only answers stands for
them, and no GPU is needed.
"""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit import layouts
from lowbit.backends import available
from lowbit.backends.cuda import fp8_matmul
from lowbit.float8 import find_granularity
from lowbit.formats import FORMATS

OLD = "the driver knows CUDA 12.4, the kernels were built with CUDA 13.0"
NF4 = FORMATS["nf4"]
FIRST, SECOND = (torch.device("cuda", i) for i in range(2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CUDA kernels are built; GPU 0 runs them with code for sm_90, GPU 1 cannot. Which GPUs were asked about."""
    found: list[int] = []

    def probe(device: int) -> tuple[str | None, int]:
        found.append(device)
        return (None, 90) if device == 0 else (OLD, 0)

    fake = SimpleNamespace(probe=probe)
    monkeypatch.setitem(sys.modules, "lowbit._cuda", fake)
    monkeypatch.setattr(lowbit, "_cuda", fake, raising=False)
    monkeypatch.setattr(available, "_CUDA_OBSTACLE", None)
    monkeypatch.setattr(available, "_PROBED", {})
    fp8_matmul._obstacle.cache_clear()
    yield found
    fp8_matmul._obstacle.cache_clear()


def test_a_gpu_is_asked_about_once(
    asked: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "_HAS_TRITON", True)
    with caplog.at_level(logging.WARNING, logger="lowbit"):
        for _ in range(3):
            assert available.kernel_layout(FIRST, NF4) == layouts.M16
            assert available.kernel_layout(SECOND, NF4) == layouts.K16
    assert asked == [0, 1]
    assert available.cuda_code(FIRST) == 90
    assert available.cuda_obstacle(FIRST) is None
    assert available.cuda_obstacle(SECOND) == OLD
    assert [r.getMessage() for r in caplog.records] == [
        f"the CUDA kernels do not run on GPU 1: {OLD}"
    ]
    monkeypatch.setattr(available, "_HAS_TRITON", False)
    assert available.kernel_layout(SECOND, NF4) == layouts.CANONICAL


def test_fp8_products_pass_over_what_cannot_run(asked: list[int]) -> None:
    row = find_granularity("row")
    assert fp8_matmul.obstacle(SECOND, row, row, 1) == OLD
    assert asked == [1]


@pytest.mark.usefixtures("asked")
def test_the_reason_is_given() -> None:
    assert available.cuda_passed_over(SECOND, NF4) == OLD
    per_row = FORMATS["kmeans4_pr"]
    assert available.cuda_passed_over(FIRST, per_row) == "they do not know the format kmeans4_pr"


def test_no_gpu_is_asked_about_where_there_is_none(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available.cuda_obstacle() is None
    assert available.kernel_layout(torch.device("cuda"), NF4) == layouts.M16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert available.cuda_obstacle() == OLD
    assert asked == [1]


@pytest.mark.usefixtures("asked")
def test_a_compiled_function_asks_too() -> None:
    def name(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if available.kernel_layout(SECOND, NF4) == layouts.M16 else 2)

    compiled = torch.compile(name, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 2
