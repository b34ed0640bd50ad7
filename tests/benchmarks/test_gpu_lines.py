"""What benchmarks/gpu.py writes while it runs, and the tables that are made of it, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_checks
import gpu_kernels
import gpu_lines
import gpu_sweep
import report_gpu
from gpu_lines import Part


def test_every_line_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    seen = []

    def first() -> Iterator[dict[str, object]]:
        yield {"a": 1}
        seen.append(path.read_text())
        yield {"a": 2}

    def second() -> Iterator[dict[str, object]]:
        yield {"b": 1}
        raise RuntimeError("the device is gone")

    with path.open("w") as file:
        failed = gpu_lines.run(
            [
                Part("first", 60, first),
                Part("second", 60, second),
                Part("third", 60, lambda: [{"c": 1}]),
            ],
            file,
        )
    assert json.loads(seen[0]) == {"part": "first", "at": 0.0, "a": 1}
    assert failed == ["second"]
    lines = gpu_lines.read(path)
    said = [(line["part"], *(k for k in ("a", "b", "c", "ended") if k in line)) for line in lines]
    assert said == [
        ("first", "a"), ("first", "a"), ("first", "ended"), ("second", "b"), ("second", "ended"),
        ("third", "c"), ("third", "ended"),
    ]  # fmt: skip
    assert lines[4]["failed"] == "the device is gone"
    assert "RuntimeError" in lines[4]["traceback"]


def test_a_part_ends_in_time(tmp_path: Path) -> None:
    now = [0.0]

    def slow() -> Iterator[dict[str, object]]:
        while True:
            now[0] += 4
            yield {"second": now[0]}

    with (tmp_path / "lines").open("w") as file:
        parts = [Part("slow", 10, slow), Part("next", 10, lambda: [{"x": 1}])]
        assert gpu_lines.run(parts, file, lambda: now[0]) == []
    lines = gpu_lines.read(tmp_path / "lines")
    assert [line.get("second") for line in lines] == [4, 8, 12, None, None, None]
    assert lines[3]["cut"]
    assert lines[-1]["part"] == "next"
    assert "cut" not in lines[-1]


def test_a_run_that_was_killed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"part": "machine", "at": 0, "machine": {}}\n{"part": "che')
    assert len(gpu_lines.read(path)) == 1
    path.write_text('{"part": \n{"part": "machine", "at": 0}\n')
    with pytest.raises(ValueError, match="line 1 of .* must be JSON"):
        gpu_lines.read(path)
    with pytest.raises(ValueError, match="must begin with those of the part machine"):
        gpu_lines.collect([])


def run_of_all(path: Path) -> dict[str, object]:
    """The result file of a run with a line of each kind."""
    about = {"gpu": "H100", "versions": {"torch": "2"}, "commit": "abc"}
    result = {"name": "torch dense bf16", "n": 64, "k": 64, "m": 1, "bytes": 8192, "us": 2.0}
    ours = {**result, "name": "cuda nf4", "us": 1.0}
    found = {
        "machine": [{"machine": about}, {"copy_bytes_per_second": 2e12}],
        "checks": [{"task": ["linear", "cuda", "nf4"], "passed": 5, "failed": 0}],
        "sweep": [
            result,
            ours,
            {**ours, "us": 0.9, "config": ["mma", 1]},
            {"name": "peer", "n": 1, "k": 1, "failed": "x"},
        ],
        "fp8": [{"name": "cuda row x row", "m": 1, "n": 2, "k": 3, "us": 1.0, "tflops": 4.0}],
        "decode": [{"model": "Llama", "family": "cuda", "format": "nf4", "ms": 1.5}],
    }  # fmt: skip
    parts = [Part(name, 60, lambda lines=lines: lines) for name, lines in found.items()]
    with path.open("w") as file:
        gpu_lines.run(parts, file)
    return gpu_lines.collect(gpu_lines.read(path))


def test_tables_are_made_of_the_lines_alone(tmp_path: Path) -> None:
    data = run_of_all(tmp_path / "lines")
    checks, products, fp8, decode = report_gpu.tables(data)
    assert "H100: 5 of 5 checks passed" in checks
    assert "| cuda nf4 | 1.0 (2.00x) |" in products
    assert "0.9" not in products
    assert "Did not run, or was wrong: peer 1x1" in products
    assert "1 us, 4" in fp8
    assert "1.500" in decode
    assert [c["us"] for c in data["candidates"]] == [0.9]
    assert data["incomplete"] == []


def test_the_fastest_are_kept() -> None:
    timed = [{"us": 3.0}, {"us": 1.0}, {"failed": "wrong"}, {"us": 2.0}, {"us": 4.0}]
    assert [t["us"] for t in gpu_lines.best(timed)] == [1.0, 2.0, 3.0]


def test_ten_minutes_are_shared_out() -> None:
    assert sum(gpu.SECONDS.values()) <= 600


def test_other_ways_are_those_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate is passed to the kernels, is timed, and the three fastest remain."""
    given = []
    ways = [("mma", tiles, 1, 1, 0, 4, True) for tiles in (1, 2, 4, 8)]
    kernel = gpu_kernels.ours(torch.randn(32, 64), "nf4", "cuda")
    dense = kernel.weight

    def linear(x, w, bias, config):
        assert w.layout == "m16"
        given.append(config)
        if config[1] == 8:
            raise RuntimeError("too many resources requested for launch")
        return x @ dense.bfloat16().T + (100 if config[1] == 4 else 0)

    monkeypatch.setattr(gpu_sweep.CUDA, "linear", linear)
    monkeypatch.setattr(gpu_sweep.weights, "candidates", lambda w, m: ways)

    def microseconds(kernel, x, replays):
        assert kernel.calls[0](x).shape == (3, 32)
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(gpu_sweep, "microseconds", microseconds)
    lines = list(gpu_sweep.candidates(kernel, 3, 60))
    assert set(given) == set(ways)
    failed = [line["config"][1] for line in lines if "failed" in line]
    assert sorted(failed) == [4, 8]
    assert [(line["config"][1], line["place"]) for line in lines if "place" in line] == [
        (1, 0),
        (2, 1),
    ]
    assert list(gpu_sweep.candidates(kernel, 3, -1)) == []


@pytest.mark.parametrize("name", ("nf4", "q4_1"))
def test_rows_that_lie_anyhow_are_checked(name: str) -> None:
    results = gpu_checks.answer(["lying", "triton", name])
    assert len(results) == 5
    assert all(r["ok"] for r in results), results


def test_parts_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is always said; shares are scaled; a tool that is not there is said to be skipped."""
    options = dict.fromkeys(("family", "format", "shape", "rows", "micro"))
    arguments = argparse.Namespace(**options, part=["fp8"], processes=1, scale=0.5, candidates=0)
    assert [(p.name, p.seconds) for p in gpu.parts(arguments)] == [("machine", 10), ("fp8", 50)]
    arguments.part = None
    assert [p.name for p in gpu.parts(arguments)] == list(gpu.SECONDS)
    assert list(gpu.micro(None)) == [{"skipped": "no --micro"}]
    assert list(gpu.micro(Path("/bin/true"))) == [{"said": ""}]
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert list(gpu.sanitize()) == [{"skipped": "compute-sanitizer not found"}]
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/bin/false")
    assert [(line["tool"], line["exit"]) for line in gpu.sanitize()] == [
        ("memcheck", 1),
        ("initcheck", 1),
    ]
