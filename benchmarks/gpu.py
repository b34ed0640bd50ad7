"""On a GPU: checks every Triton and CUDA kernel (gpu_checks.py), then times them beside other libraries.

Writes results/gpu.json. Weights rotate through more memory than any L2 cache, inside one CUDA graph; what is wrong is
reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_pool
import torch
from gpu_decode import SHAPES as MODELS
from gpu_decode import milliseconds_per_token
from gpu_fp8 import measure as measure_fp8
from gpu_kernels import FAMILIES, PEERS, TOLERANCE, Kernel, error, ours
from gpu_timing import replay_microseconds
from record import RESULTS, machine
from torch import Tensor

from lowbit.explanation import explain_request
from lowbit.formats import as_format

SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192), (10944, 4096), (4096, 7392))
ROWS = (1, 4, 16, 64, 256, 1024)
FORMATS = ("int4", "nf4", "int3", "nf3", "int2", "binary", "int8", "e4m3", "kmeans8")
TASK_SECONDS = 60.0


def microseconds(kernel: Kernel, x: Tensor) -> list[float]:
    """Times of one product, from replays of a graph of all copies."""
    for call in kernel.calls[:2]:
        call(x)
    taken = replay_microseconds(lambda: [call(x) for call in kernel.calls])
    return [us / len(kernel.calls) for us in taken]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = Kernel("copy", 2 << 30, a, [lambda x: x.clone()])
    return (2 << 30) / (statistics.median(microseconds(copy, a)) / 1e6)


def measure(
    shapes: list[tuple[int, int]], names: list[str], families: list[str], rows: list[int]
) -> Iterator[list[dict[str, Any]]]:
    """Every kernel on every shape: its times by number of rows, or what was wrong."""
    for n, k in shapes:
        weight = torch.randn(n, k, device="cuda") * 0.02
        for family, name in kernels(names, families):
            try:
                kernel = PEERS[name](weight) if family == "peer" else ours(weight, name, family)
                yield [{"n": n, "k": k, **times(kernel, m)} for m in rows]
                del kernel
            except Exception as e:  # of another library, on a shape that it does not take, say
                if family != "peer":
                    raise
                yield [{"name": name, "n": n, "k": k, "failed": str(e)[:300]}]
            torch.cuda.empty_cache()


def times(kernel: Kernel, m: int) -> dict[str, Any]:
    """Quartiles of the time of a product with m rows of x, if it is right."""
    x = torch.randn(m, kernel.weight.shape[1], device="cuda", dtype=torch.bfloat16)
    about = {"name": kernel.name, "m": m, "bytes": kernel.nbytes}
    if not (wrong := error(kernel, x)) <= TOLERANCE:
        return {**about, "failed": f"relative error {wrong:.3g}"}
    low, us, high = statistics.quantiles(microseconds(kernel, x), n=4)
    return {**about, "error": wrong, "us": us, "low_us": low, "high_us": high}


def kernels(names: list[str], families: list[str]) -> list[tuple[str, str]]:
    """(family, name) of what is timed; the family of other libraries is "peer"."""
    return [("peer", p) for p in PEERS] + [(f, name) for name in names for f in families]


def table(results: list[dict[str, Any]], bandwidth: float, rows: list[int]) -> str:
    """One line per shape and kernel: us, percent of the copy bandwidth at M = 1, ratio to dense."""
    timed = {(r["n"], r["k"], r["name"], r["m"]): r for r in results if "us" in r}
    lines = []
    for n, k, name in dict.fromkeys(key[:3] for key in timed):
        cells = []
        for m in rows:
            r, d = (timed.get((n, k, who, m)) for who in (name, "torch dense bf16"))
            if r is None or d is None:
                continue
            share = f" {100 * r['bytes'] / (r['us'] / 1e6) / bandwidth:.0f}%" if m == 1 else ""
            cells.append(f"{r['us']:.1f}{share} {d['us'] / r['us']:.2f}x")
        lines.append(f"{n}x{k} {name}: " + " | ".join(cells))
    return "\n".join(lines)


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
    """Checks by task: how many passed and failed, and the largest error."""
    tasks = list(dict.fromkeys(json.dumps(r["task"]) for r in found))
    by_task = {t: [r for r in found if json.dumps(r["task"]) == t] for t in tasks}
    return [
        {
            "task": rs[0]["task"],
            "passed": sum(r["ok"] for r in rs),
            "failed": sum(not r["ok"] for r in rs),
            "largest_error": max((r["error"] for r in rs if "error" in r), default=None),
        }
        for rs in by_task.values()
    ]


def save(data: dict[str, Any], path: Path) -> None:
    """Writes the result file."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Checks, times, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only check; TRITON_INTERPRET=1 needs no GPU"
    )
    parser.add_argument("--shape", action="append", help="N,K; may be repeated")
    parser.add_argument("--rows", type=int, action="append", help="M; may be repeated")
    parser.add_argument("--format", action="append")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=600, help="seconds, for the checks")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    families = arguments.family or list(FAMILIES)
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape or ()] or list(SHAPES)
    rows, names = arguments.rows or list(ROWS), arguments.format or list(FORMATS)
    timed = (
        []
        if arguments.check
        else [
            ["timed", family, name, n, k, rows]
            for family, name in kernels(names, families)
            for n, k in shapes  # the large ones apart: many at a time do not fit
        ]
    )
    checked = check(families, timed, arguments.processes, arguments.limit)
    wrong = any(not c["ok"] for c in checked if c["task"][1:2] != ["peer"])
    if arguments.check:
        sys.exit(wrong)
    about = {**machine(("lowbit", "torch", "triton")), "gpu": torch.cuda.get_device_name()}
    data: dict[str, Any] = {
        "machine": about, "copy_bytes_per_second": copy_bandwidth(), "checks": summed_up(checked),
        "results": [], "fp8": [], "decode": [],
        "kernels": {f"{family} {f}": explain_request(
                     as_format(f), 8192, 8192, 1, torch.bfloat16, "cuda", FAMILIES[family]).selected
                 for f in names for family in families},
    }  # fmt: skip
    # Written after every step: time on a GPU may end before the last one.
    for results in measure(shapes, names, families, rows):
        data["results"] += results
        save(data, arguments.out)
    data["fp8"] = measure_fp8(families)
    save(data, arguments.out)
    for shape in MODELS:
        for family, format in (("dense", None), *((f, "nf4") for f in families)):
            ms = milliseconds_per_token(shape, format, FAMILIES.get(family))
            data["decode"].append(
                {"model": shape.name, "family": family, "format": format, "ms": ms}
            )
    save(data, arguments.out)
    print(table(data["results"], data["copy_bytes_per_second"], rows))
    for r in data["fp8"]:
        time = f"{r['us']:.1f} us, {r['tflops']:.0f} TFLOP/s" if "us" in r else r["failed"]
        print(f"fp8 {r['m']}x{r['n']}x{r['k']} {r['name']}: {time}")
    for d in data["decode"]:
        print(f"{d['model']} {d['family']} {d['format']}: {d['ms']:.3f} ms per token")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
