"""benchmarks/gpu_checks.py and gpu_pool.py, in Triton's interpreter: what a GPU's time should not be spent on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_checks
import gpu_pool


@pytest.mark.parametrize(
    "task",
    (
        ["linear", "triton", "nf4"],
        ["fp8_product", "triton", "row"],
        ["adamw", "triton", "float8_e5m2", True],
    ),
    ids=lambda task: task[0],
)
def test_checks_pass(task: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_checks.SHAPES, "triton", ((40, 200),))
    monkeypatch.setattr(gpu_checks, "FP8_SHAPES", ((33, 40, 64), (5, 31, 49)))
    results = gpu_checks.answer(task)
    assert len(results) >= 3
    assert all(r["ok"] for r in results), results


def test_a_wrong_result_is_found_and_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_checks.SHAPES, "triton", ((40, 200),))
    right = gpu_checks.lowbit.linear

    def wrong(x: torch.Tensor, *args: object) -> torch.Tensor:
        y = right(x, *args)
        y[0, 3] += 100
        return y

    monkeypatch.setattr(gpu_checks.lowbit, "linear", wrong)
    weight, *products = gpu_checks.answer(["linear", "triton", "int4"])
    assert weight["ok"]
    assert all(not r["ok"] and "[0, 3]" in r["where"] for r in products)


def test_exceptions_and_dead_processes_are_results() -> None:
    tasks = [["nonsense"], ["adamw", "triton", "float8_e5m2", False]]
    nonsense, steps = {}, []
    for r in gpu_pool.run(tasks, processes=1, seconds=60, limit=60):
        if r["task"] == ["nonsense"]:
            nonsense = r
        else:
            steps.append(r["ok"])
    assert "KeyError" in nonsense["failed"]
    assert steps == [True] * 3
    (late,) = gpu_pool.run(tasks[1:], processes=1, seconds=0.01, limit=60)
    assert not late["ok"]
    assert late["failed"].startswith("exit -9")
    (unbegun,) = gpu_pool.run(tasks[1:], processes=1, seconds=60, limit=-1)
    assert unbegun["failed"] == "not begun in time"
