"""Times every kernel that this CPU can run, and fits what the choice among them goes by: csrc/core/costs/NAME.h.

`python benchmarks/fit_costs.py NAME` on an idle machine, with a committed tree; NAME is that of the CPU, such as zen5.
Kernels are timed one by one on one thread, weights in turns from beyond the caches. What is written says how far the
model is from what was measured; the times themselves go to benchmarks/results/costs_NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine

from lowbit import _C
from lowbit.backends.cpu import activations, weights
from lowbit.formats import Format, parse
from lowbit.layouts import Operands
from lowbit.ops.terms import matrix
from lowbit.weights.quantized import QuantTensor, tensor_specs

TARGET = Path(__file__).parents[1] / "csrc" / "core" / "costs"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # the points of `Cost` in csrc/core/kernel.h
SLOW_ROWS = (1, 2, 4, 16)  # plain C++: beyond them a straight line is taken
CHECKED_ROWS = (3, 12, 24, 96)  # for the error of the line between points
END_ROWS = (1, 64)  # timed with short groups too
GROUP, SHORT_GROUP = 128, 32
ROTATED_BYTES = 80 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Cost:
    """`Cost` of csrc/core/kernel.h, and its largest relative error at rows between the points."""

    rows: tuple[float, ...]
    single_end: float
    row_end: float
    error: float


def format_for(kernel: dict[str, Any], group: int) -> Format:
    """A format that the kernel serves."""
    bits = kernel["bits"]
    if kernel["codec"] in ("e4m3", "e5m2"):
        return parse(kernel["codec"])
    if kernel["compute"] == "b1":
        return parse("binary_row")
    if kernel["codec"] == "int":
        return parse(f"int{bits}_g{group}" + ("_a8" if kernel["compute"] == "int8" else ""))
    if kernel["scope"] == "pair":
        return parse(f"km{bits}x2_g{group}")
    count = 1 << bits
    # Integers up to 127 are exact in int8 and in bf16, and no progression of step 1.
    table = (
        tuple(float(v) for v in np.round(np.linspace(-127, 127, count))) if count < 256 else None
    )
    if table is None:
        table = tuple(float(v) for v in range(-128, 128))
    scope = "tensor" if kernel["scope"] == "shared" else "row"
    return Format.lut(
        name="fitted", bits=bits, group=group, table=None if scope == "row" else table,
        table_scope=scope, activation="int8" if kernel["compute"] == "int8" else None,
    )  # fmt: skip


def random_weight(format: Format, n: int, k: int) -> Operands:
    """Codes at random, scales of 1: values play no part."""
    tensors = {}
    for name, (shape, dtype) in tensor_specs(format, n, k).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, device="cpu")
        else:
            tensors[name] = torch.ones(shape, dtype=torch.float32, device="cpu").to(dtype)
    return matrix(QuantTensor(format, (n, k), tensors))


def measure(
    kernel: dict[str, Any],
    rows: tuple[int, ...],
    group: int,
    shape: tuple[int, int],
    seconds: float,
) -> dict[int, float]:
    """Picoseconds per weight by rows of x: medians on one thread."""
    n, k = shape
    first = random_weight(format_for(kernel, group), n, k)
    count = max(2, -(-ROTATED_BYTES // (n * k * kernel["bits"] // 8)))
    copies = [first._replace(codes=first.codes.clone()) for _ in range(count)]
    name = kernel["x"][0] if kernel["x"] else "fp32"
    found = {}
    for m in rows:
        x = torch.randn(m, k, device="cpu", dtype=torch.float32)
        if kernel["compute"] == "b1":
            signs, scales = activations.binary_quantize(x)

            def run(w: Operands, signs=signs, scales=scales) -> None:
                activations.binary_linear(
                    signs, scales, w, None, torch.float32, kernel=kernel["index"]
                )
        else:
            given = x.to(DTYPES.get(name, torch.float32))

            def run(w: Operands, given=given) -> None:
                weights.linear(given, w, None, kernel=kernel["index"])

        run(first)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            run(copies[len(taken) % count])
            taken.append(time.perf_counter() - start)
        found[m] = statistics.median(taken) * 1e12 / (n * k)
    return found


def times_of(
    kernel: dict[str, Any], shape: tuple[int, int], seconds: float
) -> dict[int, dict[int, float]]:
    """By group and rows of x; of one group alone where the kernel takes no shorter one."""
    group = max(GROUP, kernel["group_multiple"])
    rows = SLOW_ROWS if kernel["isa"] == "scalar" else ROWS + CHECKED_ROWS
    found = {group: measure(kernel, rows, group, shape, seconds)}
    whole_rows = kernel["codec"] in ("e4m3", "e5m2") or kernel["compute"] == "b1"
    if kernel["group_multiple"] <= SHORT_GROUP and not whole_rows and kernel["isa"] != "scalar":
        found[SHORT_GROUP] = measure(kernel, END_ROWS, SHORT_GROUP, shape, seconds)
    return found


def fit(times: dict[int, dict[int, float]]) -> Cost:
    """The times at the points less what the ends of groups take, which is the difference of two groups."""
    group = max(times)
    ends = {m: 0.0 for m in END_ROWS}
    if SHORT_GROUP in times:
        for m in END_ROWS:
            more = times[SHORT_GROUP][m] - times[group][m]
            ends[m] = max(0.0, more / (1 / SHORT_GROUP - 1 / group)) / m
    single_end, row_end = (ends[m] for m in END_ROWS)
    plain = {
        m: t - (single_end if m == 1 else row_end * m) / group for m, t in times[group].items()
    }
    known = sorted(set(ROWS) & set(plain))
    last, before = known[-1], known[-2]
    slope = (plain[last] - plain[before]) / (last - before)
    points = [
        plain[last] + slope * (m - last)
        if m > last
        else np.interp(m, known, [plain[i] for i in known])
        for m in ROWS
    ]
    checked = [m for m in CHECKED_ROWS if m in plain]
    errors = [abs(float(np.interp(m, ROWS, points)) / plain[m] - 1) for m in checked]
    return Cost(tuple(map(float, points)), single_end, row_end, max(errors, default=0.0))


def text(name: str, costs: dict[str, Cost], about: dict[str, Any], shape: tuple[int, int]) -> str:
    """The header."""
    errors = [c.error for c in costs.values()]
    lines = [
        "// Written by benchmarks/fit_costs.py: picoseconds per weight of "
        f"{shape[0]} x {shape[1]} on one thread,",
        f"// {about['cpu']}, commit {about['commit']}. At rows of x between the points the line is off by",
        f"// {statistics.median(errors):.0%} in the median, at most by {max(errors):.0%}; behind each, its own.",
        "#pragma once",
        "",
        '#include "core/costs.h"',
        "",
        "namespace lowbit {",
        "",
        "// clang-format off",
        f"inline constexpr KernelCost k{name.capitalize()}[] = {{",
    ]
    for kernel, c in costs.items():
        rows = ", ".join(f"{ps:.1f}f" for ps in c.rows)
        lines.append(
            f'    {{"{kernel}", {{{{{rows}}}, {c.single_end:.1f}f, {c.row_end:.1f}f}}}},  // {c.error:.0%}'
        )
    return "\n".join([*lines, "};", "// clang-format on", "", "}  // namespace lowbit", ""])


def main() -> None:
    """Measures, fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the CPU: the file's name and, capitalized, the table's")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--seconds", type=float, default=0.1, help="of each product, at least")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--data", type=Path, default=RESULTS)
    a = parser.parse_args()
    if not a.name.isidentifier():
        parser.error(f"name must be a word such as zen5, got {a.name!r}")
    torch.set_num_threads(1)
    n, k = a.shape
    kernels = [x for x in _C.kernels() if x["op"] == "linear" and not x["name"].startswith("fp8_")]
    missing = [x["name"] for x in kernels if not x["available"]]
    if missing:
        parser.error(f"this CPU cannot run {len(missing)} kernels, such as {missing[0]}")
    times = {x["name"]: times_of(x, (n, k), a.seconds) for x in kernels}
    costs = {name: fit(found) for name, found in times.items()}
    about = machine(("lowbit", "torch"))
    (a.out / f"{a.name}.h").write_text(text(a.name, costs, about, (n, k)))
    data = {"machine": about, "shape": [n, k], "picoseconds_by_group_and_rows": times}
    (a.data / f"costs_{a.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    for name, c in costs.items():
        print(f"{name}: {c.error:.0%}")


if __name__ == "__main__":
    main()
