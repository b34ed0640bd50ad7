"""Seconds per million weights of every quantizer, and k-means and KDE beside scikit-learn's k-means, into
benchmarks/results/quantizers.json. Run it on an idle machine.

Weights are drawn from N(0, 1), those of the densities from Laplace's distribution, too. An error is the squared error
over the squared weight, and a run fails where one is above what is expected of the method.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine
from torch import Tensor

import lowbit
from lowbit import Format, QuantTensor

ROWS, COLUMNS = 1024, 1024
ROW = 4096  # weights of a row beside scikit-learn
LEVELS = 16
SEEDS = 4
# The most of the error of k-means that a density of a sample may have.
KDE_ERROR = 1.05
# Where a table of 16 entries per weight, row or group of 64 ends, and 16 levels of N(0, 1) at best.
LLOYD_MAX = 0.009501


def plain(scope: str, group: int | None = None) -> Format:
    """A 4-bit format whose tables hold the weights themselves."""
    return Format.lut(bits=4, group=group, scale=None, table_scope=scope)


@dataclass(frozen=True)
class Case:
    """One method: the error must not be above `most`, on outputs for a method that takes the Hessian."""

    name: str
    method: str
    format: Format | str
    most: float
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("rtn, int4 in groups of 128", "rtn", "int4", 0.015),
    Case("rtn, nf4", "rtn", "nf4", 0.009),
    Case("gptq, int4 in groups of 128", "gptq", "int4", 0.5),
    Case("hqq, 4 bits, float zeros", "hqq", "uint4_zfloat", 0.011),
    Case("kmeans, a table per weight", "kmeans", plain("tensor"), 1.01 * LLOYD_MAX),
    Case("kmeans, per row", "kmeans", plain("row"), LLOYD_MAX),
    Case("kmeans, per group of 64", "kmeans", plain("group", 64), 0.0031),
    Case("lloyd, a table per weight", "lloyd", plain("tensor"), 1.02 * LLOYD_MAX, {"init": "kmeans++"}),
    Case("lloyd, per row", "lloyd", plain("row"), 1.1 * LLOYD_MAX, {"init": "kmeans++"}),
    Case("lloyd, per group of 64", "lloyd", plain("group", 64), 0.0045, {"init": "kmeans++"}),
    Case("kde (lm), a table per weight", "kde", plain("tensor"), 1.05 * LLOYD_MAX),
    Case("kde (km), a table per weight", "kde", plain("tensor"), 1.05 * LLOYD_MAX, {"solver": "km"}),
    Case("kde (km), per row", "kde", plain("row"), 1.05 * LLOYD_MAX, {"solver": "km"}),
    Case("distq, normal, per group of 64", "distq", plain("group", 64), 0.0216),
    Case("distq, Student's t, to absmax", "distq", plain("group", 64), 0.008,
         {"distribution": "student_t", "tail": "absmax"}),
    Case("distq, Beta", "distq", plain("group", 64), 0.0232, {"distribution": "beta"}),
    Case("search, km4 (4.25 bits)", "search", "km4", 0.0055),
    Case("search, km4x2 (4.25 bits)", "search", "km4x2", 0.0051),
    Case("search, km4_g16 (4.5 bits)", "search", "km4_g16", 0.0042),
    Case("search, km4x2_g16 (4.5 bits)", "search", "km4x2_g16", 0.0039),
    Case("nuuq, 16 levels in groups of 128", "nuuq", "kmeans4_g128", 1.01 * LLOYD_MAX),
    Case("nuuq, 4 levels in groups of 128", "nuuq", "kmeans2_g128", 0.1175),
)  # fmt: skip


def relative_error(weight: Tensor, qt: QuantTensor) -> float:
    """The squared error over the squared weight."""
    w = weight.double()
    return float((qt.dequantize().double() - w).square().sum() / w.square().sum())


def seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """The median of some calls after one that warms up."""
    call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def method_result(case: Case, weight: Tensor, hessian: Tensor) -> dict[str, object]:
    """Time and error of a case; GPTQ's error is that of outputs, over that of round to nearest."""
    given = dict(case.options) | ({"hessian": hessian} if case.method == "gptq" else {})
    qt = lowbit.quantize(weight, case.format, case.method, **given)
    error = relative_error(weight, qt)
    if case.method == "gptq":
        nearest = lowbit.quantize(weight, case.format, "rtn")
        mine, plain_ = (
            float(((d @ hessian.double()) * d).sum())
            for d in (q.dequantize().double() - weight.double() for q in (qt, nearest))
        )
        error = mine / plain_
    if not error <= case.most:
        raise RuntimeError(f"{case.name}: error {error:.5f} is above {case.most:.5f}")
    taken = seconds(lambda: lowbit.quantize(weight, case.format, case.method, **given))
    per_million = taken / weight.numel() * 1e6
    return {"name": case.name, "method": case.method, "error": error, "seconds": per_million}


def laplace(generator: np.random.Generator) -> Tensor:
    """A million weights of Laplace's distribution."""
    return torch.from_numpy(generator.laplace(size=(1000, 1000))).float()


def gaussian(generator: np.random.Generator) -> Tensor:
    """A million weights of N(0, 1)."""
    return torch.from_numpy(generator.standard_normal((1000, 1000))).float()


def density_result(draw: Callable[[np.random.Generator], Tensor]) -> dict[str, object]:
    """KDE of a sample of 0.1 % beside k-means on all points, exact and scikit-learn's."""
    from sklearn.cluster import KMeans

    ratios: dict[str, list[float]] = {"lm": [], "km": []}
    for seed in range(SEEDS):
        weight = draw(np.random.default_rng(seed))
        best = relative_error(weight, lowbit.quantize(weight, plain("tensor"), "kmeans"))
        for solver, found in ratios.items():
            qt = lowbit.quantize(weight, plain("tensor"), "kde", solver=solver, seed=seed)
            found.append(relative_error(weight, qt) / best)
    points = weight.numpy().reshape(-1, 1)
    start = time.perf_counter()
    KMeans(LEVELS, n_init=1, random_state=0).fit(points)
    theirs = time.perf_counter() - start
    times = {
        solver: seconds(lambda s=solver: lowbit.quantize(weight, plain("tensor"), "kde", solver=s))
        for solver in ratios
    }
    exact = seconds(lambda: lowbit.quantize(weight, plain("tensor"), "kmeans"))
    worst = max(map(max, ratios.values()))
    if not worst <= KDE_ERROR:
        raise RuntimeError(f"{draw.__name__}: the error of kde is {worst:.3f} of that of k-means")
    return {
        "distribution": draw.__name__,
        "error_ratios": ratios,
        "kde_seconds": times,
        "kmeans_seconds": exact,
        "scikit_learn_seconds": theirs,
    }


def row_result() -> dict[str, object]:
    """k-means of rows of 4096 weights with 16 entries beside scikit-learn's, of one start and the best of ten,
    per row.
    """
    from sklearn.cluster import KMeans

    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((64, ROW))).float()
    some = weight[:8].double().numpy()
    theirs = {}
    for starts in (1, 10):
        start = time.perf_counter()
        fits = [KMeans(LEVELS, n_init=starts, random_state=0).fit(row[:, None]) for row in some]
        theirs[starts] = (time.perf_counter() - start) / len(some)
    qt = lowbit.quantize(weight, plain("row"), "kmeans")
    errors = (qt.dequantize() - weight)[: len(some)].double().square().sum(1).tolist()
    for error, fit in zip(errors, fits, strict=True):
        if not error <= fit.inertia_ * (1 + 1e-5):
            raise RuntimeError(f"k-means: {error:.5f}, and {fit.inertia_:.5f} with scikit-learn")
    ours = seconds(lambda: lowbit.quantize(weight, plain("row"), "kmeans")) / len(weight)
    return {
        "weights": ROW,
        "levels": LEVELS,
        "seconds": ours,
        "scikit_learn_seconds": theirs[10],
        "scikit_learn_one_start_seconds": theirs[1],
    }


def main() -> None:
    """Measures everything, then writes the file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(4 * COLUMNS, COLUMNS, generator=generator)
    x = x @ torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    hessian = x.T @ x / len(x)
    results = {
        "threads": torch.get_num_threads(),
        "methods": [method_result(case, weight, hessian) for case in CASES],
        "densities": [density_result(draw) for draw in (gaussian, laplace)],
        "rows": row_result(),
        "machine": machine(("lowbit", "numpy", "scikit-learn", "scipy", "torch")),
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1, sort_keys=True)
    (RESULTS / "quantizers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
