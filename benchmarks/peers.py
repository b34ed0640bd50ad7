"""Times our kernels and those of other libraries side by side and writes benchmarks/results/peers.json.

Every candidate is checked against float64 on its own weight before it is timed, and a wrong one is not timed.
Run it on an idle machine, with the Python that `make peers` made. cases.py says what is compared; report.py evaluates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import ggml, graphs, ours, torch_ops
from adapters.base import Candidate, Unsupported
from adapters.read import read
from cases import CASES, Case
from overhead import overhead
from record import RESULTS, machine
from shapes import COMPARED, THREADS
from timing import interleave
from torch import Tensor

PACKAGES = (
    "lowbit",
    "torch",
    "torchao",
    "bitsandbytes",
    "onnxruntime",
    "openvino",
    "llama-cpp-python",
    "libggml-python",
)
LARGE = 64  # rows from which a block is one pass
LARGEST = 128  # more rows are measured on the first shape alone: they take minutes on each


def make(name: str, weight: Tensor, threads: int) -> Candidate:
    """The candidate of a name in cases.py."""
    if found := re.fullmatch(r"(lib)?ggml (\w+)( repacked)?", name):
        package = "libggml" if found[1] else "llama_cpp"
        return ggml.ggml(weight, threads, found[2], bool(found[3]), package)
    if found := re.fullmatch(r"onnxruntime b(\d)", name):
        return graphs.onnxruntime(weight, threads, int(found[1]))
    if found := re.fullmatch(r"OpenVINO u(\d)", name):
        return graphs.openvino(weight, threads, int(found[1]))
    if found := re.fullmatch(r"torch dense (\w+)", name):
        return torch_ops.dense(weight, getattr(torch, found[1]))
    if found := re.fullmatch(r"(prefetched )?read (.*)", name):
        return read(make(found[2], weight, threads), threads, bool(found[1]))
    others: dict[str, Callable[[Tensor], Candidate]] = {
        "torch int4pack": torch_ops.int4pack,
        "torch int8pack": torch_ops.int8pack,
        "torch _int_mm": torch_ops.int_mm,
        "torchao int4": torch_ops.torchao_int4,
        "bitsandbytes nf4": torch_ops.bitsandbytes_nf4,
    }
    if name in others:
        return others[name](weight)
    format, _, dtype = name.partition(" ")
    return ours.lowbit(weight, format, getattr(torch, dtype or "bfloat16"))


def measure(
    cases: Sequence[Case], shape: tuple[int, int], threads: int, seconds: float
) -> list[dict[str, Any]]:
    """Every candidate of the cases on one shape, at each number of rows that a case with it wants."""
    torch.set_num_threads(threads)
    wanted: dict[str, set[int]] = {}
    for case in cases:
        rows = [m for m in case.rows if m <= LARGEST or shape == COMPARED[0]]
        for name in (*case.ours, *case.rivals):
            wanted.setdefault(name, set()).update(rows)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    xs = {
        m: torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
        for m in sorted(set().union(*wanted.values()))
    }
    results: list[dict[str, Any]] = []
    candidates: dict[str, Candidate] = {}
    errors: dict[tuple[str, int], float] = {}
    for name, rows in wanted.items():
        about = {"name": name, "n": shape[0], "k": shape[1], "threads": threads}
        try:
            candidate = make(name, weight, threads)
            for m in sorted(rows):
                errors[name, m] = candidate.check(xs[m])
        except Unsupported as e:
            results.append({**about, "unsupported": str(e)})
            continue
        except RuntimeError as e:
            if any(name in case.ours for case in cases):
                raise
            # A peer that is wrong, or that its library refuses: shown in the results, never timed.
            print(f"{name} on {shape}: {e}", file=sys.stderr)
            results.append({**about, "failed": str(e)[:300]})
            continue
        candidate.weight = torch.empty(0)  # checked: half a gigabyte that is not needed any more
        candidates[name] = candidate
    for m, x in xs.items():
        names = [name for name in candidates if m in wanted[name]]
        rounds, block = (5, seconds) if m < LARGE else (3, 0.0)
        times = interleave([candidates[name] for name in names], x, rounds, block)
        for name, time in zip(names, times, strict=True):
            c = candidates[name]
            results.append({
                "name": name, "label": c.name, "n": shape[0], "k": shape[1], "m": m, "threads": threads,
                "bits": round(c.bits, 4), "activation": c.activation, "error": errors[name, m],
                "us": time.us, "low_us": time.low_us, "high_us": time.high_us,
            })  # fmt: skip
        print(f"{shape} M={m} {threads} threads: {len(names)} candidates", file=sys.stderr)
    for c in candidates.values():
        c.close()
    return results


def run(
    isa: str | None, only: str, shapes: list[tuple[int, int]], seconds: float
) -> list[dict[str, Any]]:
    """The cases of one instruction set whose names hold `only`."""
    cases = [case for case in CASES if case.isa == isa and only in case.name]
    results = []
    for shape in shapes if cases else ():
        for threads in THREADS:
            results += [{**r, "isa": isa} for r in measure(cases, shape, threads, seconds)]
    return results


def main() -> None:
    """Measures the cases without a cap in this process, the others in one of their own each, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--quick", action="store_true", help="one shape, short blocks")
    parser.add_argument("--shape", action="append", help="N,K; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--isa", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape or ()]
    shapes = shapes or list(COMPARED[: 1 if arguments.quick else None])
    seconds = 0.005 if arguments.quick else 0.02
    results = run(arguments.isa, arguments.only, shapes, seconds)
    if arguments.isa is not None:
        json.dump(results, sys.stdout)
        return
    for isa in dict.fromkeys(case.isa for case in CASES if case.isa):
        command = [sys.executable, *sys.argv, "--isa", isa]
        environment = {**os.environ, "LOWBIT_ISA": isa}
        done = subprocess.run(
            command, check=True, env=environment, stdout=subprocess.PIPE, text=True
        )
        results += json.loads(done.stdout)
    data = {"machine": machine(PACKAGES), "overhead": overhead(), "results": results}
    text = json.dumps(data, indent=1, sort_keys=True)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
