"""Ten minutes on a GPU: clocks and bandwidth, every kernel checked (gpu_checks.py), times of products beside other
libraries and of every other way to compute them, FP8 products, a decoded token.

A part takes no longer than its share. Each writes a line of JSON to results/gpu.jsonl as soon as it knows something,
and results/gpu.json is made of these lines alone. Weights rotate through more memory than any L2 cache, inside one CUDA
graph; what is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_lines
import gpu_pool
import torch
from gpu_decode import SHAPES as MODELS
from gpu_decode import milliseconds_per_token
from gpu_fp8 import measure as measure_fp8
from gpu_kernels import FAMILIES, PEERS, Kernel, ours
from gpu_lines import Line, Part
from gpu_sweep import microseconds, sweep
from record import RESULTS, machine

from lowbit.backends import available
from lowbit.explanation import explain_request
from lowbit.formats import as_format

SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (28672, 8192))
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
FORMATS = ("int4", "nf4", "int3", "int2", "binary")
SMALL = (1536, 576)  # a layer whose product is shorter than its call
TASK_SECONDS = 60.0
# Of ten minutes.
SECONDS = {
    "machine": 20,
    "micro": 20,
    "checks": 120,
    "sanitizer": 40,
    "sweep": 220,
    "fp8": 100,
    "decode": 50,
    "eager": 10,
}
_CLOCKS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)


def about(names: list[str], families: list[str]) -> Iterator[Line]:
    """The machine, its clocks, what a copy and a read take, and the kernels that are chosen at M = 1."""
    found = {**machine(("lowbit", "torch", "triton")), "gpu": torch.cuda.get_device_name()}
    yield {"machine": found}
    yield {"obstacle": available.cuda_obstacle(), "code": code()}
    yield {"clocks": clocks()}
    copied, read = bandwidths()
    yield {"copy_bytes_per_second": copied, "read_bytes_per_second": read}
    chosen = {
        f"{family} {f}": explain_request(
            as_format(f), 8192, 8192, 1, torch.bfloat16, "cuda:0", FAMILIES[family]
        ).selected
        for f in names
        for family in families
    }
    yield {"kernels": chosen}


def code() -> int | None:
    """The architecture that the CUDA kernels which run were compiled for; None if they do not run."""
    runs = available.cuda_obstacle() is None
    return available.cuda_code(torch.device("cuda", 0)) if runs else None


def clocks() -> dict[str, str]:
    """What nvidia-smi says of GPU 0."""
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return dict(zip(_CLOCKS.split(","), map(str.strip, said.split(",")), strict=True))


def bandwidths() -> tuple[float, float]:
    """Bytes per second of a large device copy, read and written, and of a sum, read."""
    size = 1 << 30
    a = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
    calls = {"copy": (2 * size, torch.Tensor.clone), "read": (size, torch.Tensor.sum)}
    rates = [
        nbytes / (statistics.median(microseconds(Kernel(what, nbytes, a, [call]), a)) / 1e6)
        for what, (nbytes, call) in calls.items()
    ]
    return rates[0], rates[1]


def check(
    families: list[str], timed: list[list[Any]], processes: int, limit: float
) -> list[dict[str, Any]]:
    """Results of all checks, several at a time: most of what they take is Triton's compiler."""
    tasks = [*gpu_checks.tasks(families), *timed]
    found = gpu_pool.run(tasks, processes, TASK_SECONDS, limit)
    wrong = [r for r in found if not r["ok"]]
    for r in wrong[:40]:
        print("WRONG", json.dumps(r)[:700])
    print(f"{len(found)} checks, {len(wrong)} wrong", flush=True)
    return found


def summed_up(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks by task: how many passed and failed, the largest error, and what failed first."""
    tasks = list(dict.fromkeys(json.dumps(r["task"]) for r in found))
    by_task = {t: [r for r in found if json.dumps(r["task"]) == t] for t in tasks}
    return [
        {
            "task": rs[0]["task"],
            "passed": sum(r["ok"] for r in rs),
            "failed": sum(not r["ok"] for r in rs),
            "largest_error": max((r["error"] for r in rs if "error" in r), default=None),
            "first_failed": next((r for r in rs if not r["ok"]), None),
        }
        for rs in by_task.values()
    ]


def sanitize() -> Iterator[Line]:
    """compute-sanitizer on a few small products, for memory out of bounds and memory that nothing wrote."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"skipped": "compute-sanitizer not found"}
        return
    for kind in ("memcheck", "initcheck"):
        worker = [sys.executable, str(Path(gpu_checks.__file__))]
        try:
            said = subprocess.run(
                [tool, "--tool", kind, "--error-exitcode", "3", *worker],
                input=json.dumps(["lying", "cuda", "nf4"]) + "\n",
                capture_output=True,
                text=True,
                timeout=SECONDS["sanitizer"],
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            yield {"tool": kind, "failed": str(e)[:300]}
            continue
        words = said.stdout[-300:] + said.stderr[-1000:]
        yield {"tool": kind, "exit": said.returncode, "said": words}


def micro(program: Path | None) -> Iterator[Line]:
    """What gpu_micro.cu says, if it was compiled: what the design of the wgmma kernels depends on."""
    if program is None:
        yield {"skipped": "no --micro"}
        return
    said = subprocess.run(
        [program], capture_output=True, text=True, timeout=SECONDS["micro"], check=True
    )
    yield {"said": said.stdout}


def decode(families: list[str]) -> Iterator[Line]:
    """Milliseconds for a token of whole models."""
    for shape in reversed(MODELS):
        for family, format in (("dense", None), *((f, "nf4") for f in families)):
            ms = milliseconds_per_token(shape, format, FAMILIES.get(family))
            yield {"model": shape.name, "family": family, "format": format, "ms": ms}


def eager(families: list[str]) -> Iterator[Line]:
    """Microseconds of a call of a small layer without a graph: what Python and the launches take."""
    n, k = SMALL
    weight = torch.randn(n, k, device="cuda") * 0.02
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    kernels = [PEERS["dense"](weight), *(ours(weight, "nf4", family) for family in families)]
    for kernel in kernels:
        for call in kernel.calls[:20]:
            call(x)
        taken = []
        for _ in range(30):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for call in kernel.calls[:100]:
                call(x)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - begin) * 1e6 / len(kernel.calls[:100]))
        yield {"name": kernel.name, "n": n, "k": k, "us": statistics.median(taken)}


def parts(arguments: argparse.Namespace) -> list[Part]:
    """What is done, in order: first what says whether the rest means anything."""
    families = arguments.family or list(FAMILIES)
    names = arguments.format or list(FORMATS)
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape or ()] or list(SHAPES)
    rows = arguments.rows or list(ROWS)
    limit = SECONDS["checks"] * 0.8  # of the last task to begin
    work = {
        "machine": lambda: about(names, families),
        "micro": lambda: micro(arguments.micro),
        "checks": lambda: summed_up(check(families, [], arguments.processes, limit)),
        "sanitizer": sanitize,
        "sweep": lambda: sweep(shapes, names, families, rows, arguments.candidates),
        "fp8": lambda: measure_fp8(families),
        "decode": lambda: decode(families),
        "eager": lambda: eager(families),
    }
    chosen = {"machine", *(arguments.part or work)}
    return [Part(n, SECONDS[n] * arguments.scale, work[n]) for n in work if n in chosen]


def save(data: dict[str, Any], path: Path) -> None:
    """Writes the result file."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    fresh.rename(path)


def main() -> None:
    """Runs the parts and writes the lines, and the result file of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only check; TRITON_INTERPRET=1 needs no GPU"
    )
    parser.add_argument("--part", action="append", choices=SECONDS, help="may be repeated")
    parser.add_argument("--shape", action="append", help="N,K; may be repeated")
    parser.add_argument("--rows", type=int, action="append", help="M; may be repeated")
    parser.add_argument("--format", action="append")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=600, help="seconds, with --check")
    parser.add_argument("--scale", type=float, default=1, help="of the time of each part")
    parser.add_argument(
        "--candidates", type=float, default=0, help="seconds for other ways of a product"
    )
    parser.add_argument("--micro", type=Path, help="gpu_micro.cu, compiled")
    parser.add_argument("--lines", type=Path, default=RESULTS / "gpu.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    if arguments.check:
        families = arguments.family or list(FAMILIES)
        found = check(families, [], arguments.processes, arguments.limit)
        sys.exit(any(not c["ok"] for c in found))
    with arguments.lines.open("w") as file:
        failed = gpu_lines.run(parts(arguments), file)
    lines = gpu_lines.read(arguments.lines)
    data = gpu_lines.collect(lines)
    save(data, arguments.out)
    wrong = sum(c["failed"] for c in data["checks"])
    print(f"{len(lines)} lines; parts that failed: {failed or 'none'}; checks that failed: {wrong}")
    sys.exit(bool(failed or wrong))


if __name__ == "__main__":
    main()
