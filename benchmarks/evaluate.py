"""Ratios of the measured times, case by case: what cases.py claims against what peers.json holds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cases import CASES, Case
from shapes import THREADS

Key = tuple[str | None, str, int, int, int, int]


@dataclass(frozen=True)
class Ratio:
    """Time of the fastest rival / time of ours, on one shape."""

    case: Case
    ours: str
    rival: str
    m: int
    threads: int
    shape: tuple[int, int]
    value: float

    @property
    def target(self) -> float:
        """What the case aims at on this number of threads."""
        return self.case.target[THREADS.index(self.threads)]


def times(data: dict[str, Any]) -> dict[Key, float]:
    """Median microseconds by (isa, name, n, k, m, threads)."""
    return {
        (r["isa"], r["name"], r["n"], r["k"], r["m"], r["threads"]): r["us"]
        for r in data["results"]
        if "us" in r
    }


def ratios(data: dict[str, Any]) -> list[Ratio]:
    """Every ratio that the file holds."""
    us = times(data)
    shapes = sorted({(n, k) for _, _, n, k, _, _ in us})
    return [r for case in CASES for shape in shapes for r in _ratios(case, shape, us)]


def _ratios(case: Case, shape: tuple[int, int], us: dict[Key, float]) -> Iterator[Ratio]:
    for threads in THREADS:
        for m in case.rows:
            rest = (*shape, m, threads)
            rivals = {
                r: us[(case.isa, r, *rest)] for r in case.rivals if (case.isa, r, *rest) in us
            }
            for ours in case.ours:
                if rivals and (case.isa, ours, *rest) in us:
                    best = min(rivals, key=rivals.__getitem__)
                    value = rivals[best] / us[(case.isa, ours, *rest)]
                    yield Ratio(case, ours, best, m, threads, shape, value)


def summary_table(found: Sequence[Ratio]) -> str:
    """One line per case: median and worst over our formats, M and shapes."""
    lines = [
        "| case | M | target | 1 thread: median | worst | 2 threads: median | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        cells = []
        for threads in THREADS:
            some = [r for r in found if r.case == case and r.threads == threads]
            cells += _cells(some, lambda r: f"{r.ours}, M = {r.m}, {r.shape[0]}x{r.shape[1]}")
        rows = ", ".join(map(str, case.rows))
        lines.append(f"| {case.name} | {rows} | {_target(case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def full_table(found: Sequence[Ratio]) -> str:
    """One line per case, format and M: median and worst over the shapes."""
    lines = [
        "| case | ours | M | target | 1 thread: median | worst | 2 threads: median | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for ours in case.ours:
            for m in case.rows:
                cells = []
                for threads in THREADS:
                    some = [
                        r
                        for r in found
                        if (r.case, r.ours, r.m, r.threads) == (case, ours, m, threads)
                    ]
                    cells += _cells(some, lambda r: f"{r.rival}, {r.shape[0]}x{r.shape[1]}")
                lines.append(
                    f"| {case.name} | {ours} | {m} | {_target(case)} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def _target(case: Case) -> str:
    return " / ".join(f"{t:g}" for t in dict.fromkeys(case.target))


def _cells(some: Sequence[Ratio], where) -> tuple[str, str]:
    """Median, bold where the target is met, and the worst with what it was."""
    if not some:
        return "not measured", ""
    median = statistics.median(r.value for r in some)
    worst = min(some, key=lambda r: r.value / r.target)
    met = median >= some[0].target
    text = f"**{median:.2f}x**" if met else f"{median:.2f}x"
    return text, f"{worst.value:.2f}x ({where(worst)})"
