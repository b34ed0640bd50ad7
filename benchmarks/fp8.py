"""Times `fp8.scaled_mm` beside torch's dense bf16 F.linear and torch._scaled_mm; writes
benchmarks/results/fp8_<instruction set>.json.

Operands are quantized beforehand: the product alone is timed. Weights rotate through more than twice the last-level
cache, candidates take turns, every result is checked against float64 first. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from adapters.base import Candidate, num_copies
from record import RESULTS, machine
from timing import interleave
from torch import Tensor

from lowbit import _C, fp8
from lowbit.reference import fp8 as reference

SHAPES = ((4096, 4096),)
ROWS = (1, 4, 64, 128, 512)
PAIRINGS = (
    ("tensor", "tensor"),
    ("row", "row"),
    ("1x128", "128x128"),
    ("1x16", "1x16"),
    ("mx", "mx"),
)
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
DENSE, TORCH = "torch dense bf16", "torch._scaled_mm"
Product = Callable[[], Tensor]
# Of y rounded to bf16: 2^-9 of each element, and less of their norm. Sums err by much less.
TOLERANCE = 2**-9


def rotating(name: str, bits: float, copies: list[Product]) -> Candidate:
    """A candidate whose pass is one product with each copy of the weight."""
    results: list[Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            results[:] = [product() for product in copies]

    return Candidate(name, bits, "", torch.empty(0), len(copies), lambda _: run, lambda: results)


def dense(x: Tensor, weight: Tensor) -> Candidate:
    """F.linear in bf16."""
    a, w = x.bfloat16(), weight.bfloat16()
    copies = [w.clone() for _ in range(num_copies(w.nbytes))]
    return rotating(DENSE, 16, [partial(F.linear, a, copy) for copy in copies])


def ours(x: Tensor, weight: Tensor, pairing: tuple[str, str], types: tuple[str, str]) -> Candidate:
    """`fp8.scaled_mm`."""
    a, scale_a = fp8.quantize(x, TYPES[types[0]], pairing[0])
    b, scale_b = fp8.quantize(weight, TYPES[types[1]], pairing[1])
    copies = [(b.clone(), scale_b.clone()) for _ in range(num_copies(b.nbytes))]
    name = " x ".join(f"{t} {g}" for t, g in zip(types, pairing, strict=True))
    products = [partial(fp8.scaled_mm, a, w, scale_a, scale) for w, scale in copies]
    check(name, products[0](), a, b, scale_a, scale_b)
    return rotating(f"lowbit {name}", 8 * (1 + scale_b.nbytes / b.nbytes), products)


def torchs(x: Tensor, weight: Tensor) -> Candidate:
    """torch._scaled_mm with a scale for each tensor, the pairing that runs on CPUs."""
    a, scale_a = fp8.quantize(x)
    b, scale_b = fp8.quantize(weight)
    copies = [b.clone() for _ in range(num_copies(b.nbytes))]
    call = partial(torch._scaled_mm, a, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)
    products = [partial(call, w.t()) for w in copies]
    check(TORCH, products[0](), a, b, scale_a, scale_b)
    return rotating(TORCH, 8, products)


def check(name: str, y: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    """Raises RuntimeError if a product is wrong."""
    exact = reference.scaled_mm(a, b, scale_a, scale_b)
    error = float((y.double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name} is wrong: relative error {error:.3g}")


def measure(n: int, k: int, m: int, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Times of every candidate at one shape."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    made = [dense(x, weight)]
    made += [ours(x, weight, pairing, ("e4m3", "e4m3")) for pairing in PAIRINGS]
    made.append(ours(x, weight, ("row", "row"), ("e5m2", "e4m3")))
    failed = None
    try:
        made.append(torchs(x, weight))
    except (RuntimeError, NotImplementedError) as error:
        failed = str(error).splitlines()[0]
    times = interleave(made, x, rounds, seconds)
    return {
        "n": n, "k": k, "m": m, "threads": threads, "scaled_mm_error": failed,
        "results": [
            {"name": c.name, "bits": c.bits, "us": t.us, "low_us": t.low_us, "high_us": t.high_us,
             "speedup": times[0].us / t.us}
            for c, t in zip(made, times, strict=True)
        ],
    }  # fmt: skip


def table(cases: list[dict[str, Any]]) -> str:
    """Microseconds and the ratio to dense."""
    lines = []
    for case in cases:
        lines.append(f"M={case['m']} {case['n']}x{case['k']}, {case['threads']} threads")
        lines += [
            f"  {r['name']:<36} {r['us']:10.1f} us {r['speedup']:6.2f}x" for r in case["results"]
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", help="N,K; may be repeated")
    parser.add_argument("--m", action="append", type=int)
    parser.add_argument("--threads", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = machine(("torch",))
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape or ()] or list(SHAPES)
    cases = [
        measure(n, k, m, threads, arguments.rounds, arguments.seconds)
        for n, k in shapes
        for threads in arguments.threads or (1, 2)
        for m in arguments.m or ROWS
    ]
    data = {"machine": about, "cases": cases}
    isa = _C.fp8_matmul_name().rpartition("_")[2]
    out = arguments.out or RESULTS / f"fp8_{isa}.json"
    out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    print(table(cases))


if __name__ == "__main__":
    main()
