"""Plots of benchmarks/results/{kl,methods,peers}.json, beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from cases import EVERY_M, PEERS_4, PEERS_8, PEERS_INT8
from evaluate import times
from shapes import COMPARED, THREADS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE = COMPARED[0]
OURS_BY_BITS = (
    "binary", "ternary_trits", "int2", "kmeans2", "int3", "kmeans3", "int4", "nf4", "int8",
    "kmeans8", "e4m3",
)  # fmt: skip
PEERS_BY_BITS = (
    *PEERS_4, *PEERS_8, "onnxruntime b2", "ggml Q2_K", "ggml Q2_K repacked", "ggml Q3_K", "ggml TQ1_0",
    "ggml TQ2_0",
)  # fmt: skip
# Methods that are compared with one another, as methods.json names them.
FAMILIES = {
    "Integers": ("int", "int with zero", "int, outliers", "int, allocated", "HQQ", "TWN", "BitNet b1.58"),
    "Fixed tables": ("NF", "SF", "AF", "absmax-optimal"),
    "k-means": (
        "k-means", "k-means, weighted", "k-means per row", "k-means per row, weighted",
        "k-means per row, Fisher", "k-means per row, Fisher, outliers",
    ),
    "Other fitted tables": ("KDE", "Lloyd", "DistQ, Student's t", "NUUQ", "multi-bit binary"),
    "Error of outputs": (
        "AWQ, int", "AWQ, int with zero", "GPTQ, int", "GPTQ, int with zero", "GPTQ, int, act_order",
        "GPTQ, int, allocated", "GPTQ, NF", "GPTQ, k-means", "GPTQ, k-means per row",
    ),
}  # fmt: skip


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the three plots and returns their paths."""
    made = []
    for name, plot in (
        ("time_over_m", _time),
        ("bandwidth", _bandwidth),
        ("speed_over_bits", _bits),
    ):
        figure, axes = plt.subplots(1, len(THREADS), figsize=(11, 4), layout="constrained")
        for threads, ax in zip(THREADS, axes, strict=True):
            plot(data, threads, ax)
            ax.set_title(f"{SHAPE[0]} x {SHAPE[1]}, {threads} thread{'s' * (threads > 1)}")
        made.append(folder / f"peers_{name}.png")
        figure.savefig(made[-1], dpi=80, metadata={"Software": None})
        plt.close(figure)
    return made


def draw_methods(data: dict[str, Any], folder: Path) -> Path:
    """Error of outputs over bits per weight: a row for each model, a panel for each family of methods.

    A panel shows its family in colour, named at the ends of the lines, and all other methods in grey.
    """
    size = (3.6 * len(FAMILIES), 3.4 * len(data))
    figure, grid = plt.subplots(
        len(data), len(FAMILIES), figsize=size, layout="constrained", sharex=True, sharey="row",
        squeeze=False,
    )  # fmt: skip
    for axes, model in zip(grid, data.values(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in sorted(model["rows"], key=lambda r: r["bits_per_weight"]):
            lines.setdefault(r["method"], []).append((r["bits_per_weight"], r["output_error"]))
        axes[0].set_ylabel(
            f"{model['title'].partition(' (')[0]}\nrelative squared error of outputs"
        )
        for ax, (family, members) in zip(axes, FAMILIES.items(), strict=True):
            _family(ax, lines, members)
            if ax in grid[0]:
                ax.set_title(family)
            if ax in grid[-1]:
                ax.set_xlabel("bits per weight")
    path = folder / "methods.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def draw_kl(data: dict[str, Any], folder: Path) -> Path:
    """KL over bits per weight: a panel for each model and kind of data, ggml's types beside formats of ours, every
    point named.
    """
    models = data["models"].values()
    kinds = ("none", "importance", "gptq")
    figure, grid = plt.subplots(
        len(models), len(kinds), figsize=(4.6 * len(kinds), 3.6 * len(models)), layout="constrained",
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    for axes, model in zip(grid, models, strict=True):
        axes[0].set_ylabel(f"{model['title'].partition(' (')[0]}\nKL, nats per token")
        for ax, kind in zip(axes, kinds, strict=True):
            ax.set(yscale="log", title=kind, xlabel="bits per weight")
            # GPTQ is beside ggml with importance.
            theirs = "importance" if kind == "gptq" else kind
            for own, color in ((True, "C0"), (False, "C1")):
                points = [
                    (r["bits_per_weight"], r["kl"], r["format"].removeprefix("ggml "))
                    for r in model["rows"]
                    if r["format"].startswith("ggml ") != own
                    and r["data"] == (kind if own else theirs)
                ]
                for x, y, name in points:
                    ax.plot(x, y, "o", color=color, markersize=3)
                    ax.annotate(name, (x, y), color=color, fontsize=7)
    path = folder / "kl.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def _family(ax: Any, lines: dict[str, list[tuple[float, float]]], members: tuple[str, ...]) -> None:
    """One panel: the members named right of where their lines end, as far apart as text is high."""
    colors = {name: f"C{i}" for i, name in enumerate(members)}
    shown = [name for name in members if name in lines]
    for name, points in lines.items():
        if name not in colors:
            ax.plot(*zip(*points, strict=True), color="0.85", linewidth=0.8, zorder=1)
    ax.set(yscale="log", xlim=(1.9, 11), xticks=range(2, 7))
    low, high = (math.log10(y) for y in _limits(lines))
    gap = (high - low) / 15
    bottom = -math.inf
    for name in sorted(shown, key=lambda name: lines[name][-1][1]):
        x, y = lines[name][-1]
        bottom = max(bottom + gap, math.log10(y))
        color = colors[name]
        ax.plot(*zip(*lines[name], strict=True), "o-", color=color, markersize=3, zorder=2)
        ax.annotate(
            name, (x, y), (6.1, 10**bottom), color=color, fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "relpos": (0, 0.5)},
        )  # fmt: skip


def _limits(lines: dict[str, list[tuple[float, float]]]) -> tuple[float, float]:
    errors = [y for points in lines.values() for _, y in points]
    return min(errors), max(errors)


def _time(data: dict[str, Any], threads: int, ax: Any) -> None:
    us = times(data)

    def line(names: tuple[str, ...], label: str, style: str) -> None:
        points = {
            m: min(us[key] for n in names if (key := (None, n, *SHAPE, m, threads)) in us)
            for m in EVERY_M
            if any((None, n, *SHAPE, m, threads) in us for n in names)
        }
        ax.plot(list(points), list(points.values()), style, label=label)

    line(("torch dense bfloat16",), "torch dense bf16", "k--")
    line((*PEERS_4, *PEERS_INT8), "best peer at 4 bits or int8", "C1o-")
    line(("int4",), "lowbit int4, exact", "C0o-")
    line(("nf4",), "lowbit nf4, exact", "C2.-")
    line(("int4_g128_a8",), "lowbit int4, int8 activations", "C3o-")
    ax.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="us")
    ax.set_xticks(EVERY_M, [str(m) for m in EVERY_M])
    ax.legend()


def _bandwidth(data: dict[str, Any], threads: int, ax: Any) -> None:
    us, bits = times(data), _bits_of(data)
    names = [n for n in OURS_BY_BITS if (None, n, *SHAPE, 1, threads) in us]
    rates = [_bytes(bits[n]) / us[(None, n, *SHAPE, 1, threads)] / 1e3 for n in names]
    ax.bar(names, rates)
    reads = ((None, f"{kind}read int4", *SHAPE, 1, threads) for kind in ("", "prefetched "))
    ceiling = min((us[key] for key in reads if key in us), default=None)
    if ceiling is not None:
        ax.axhline(
            _bytes(bits["int4"]) / ceiling / 1e3, color="k", linestyle="--", label="plain read"
        )
        ax.legend()
    ax.set(ylabel="GB/s of weights, M = 1")
    ax.tick_params("x", rotation=60)


def _bits(data: dict[str, Any], threads: int, ax: Any) -> None:
    us, bits = times(data), _bits_of(data)
    for names, label, color in (
        (PEERS_BY_BITS, "peers", "C1"),
        (OURS_BY_BITS, "lowbit, exact", "C0"),
    ):
        some = [n for n in names if (None, n, *SHAPE, 1, threads) in us]
        y = [us[(None, n, *SHAPE, 1, threads)] for n in some]
        ax.scatter([bits[n] for n in some], y, label=label, color=color)
        for n, value in zip(some, y, strict=True):
            ax.annotate(n, (bits[n], value), fontsize=6)
    ax.set(xlabel="bits per weight", ylabel="us, M = 1", ylim=(0, None))
    ax.legend()


def _bits_of(data: dict[str, Any]) -> dict[str, float]:
    return {
        r["name"]: r["bits"] for r in data["results"] if "bits" in r and (r["n"], r["k"]) == SHAPE
    }


def _bytes(bits: float) -> float:
    return SHAPE[0] * SHAPE[1] * bits / 8
