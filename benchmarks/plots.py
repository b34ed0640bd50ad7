"""Plots of benchmarks/results/{peers,methods}.json, beside them."""

from __future__ import annotations

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
    """Error of outputs over bits per weight of every method, one panel per model."""
    size = (5 * len(data) + 2, 6)
    figure, grid = plt.subplots(
        1, len(data), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    axes = grid[0]
    methods = dict.fromkeys(r["method"] for model in data.values() for r in model["rows"])
    lines: dict[str, Any] = {}
    for ax, model in zip(axes, data.values(), strict=True):
        for i, name in enumerate(methods):
            some = [r for r in model["rows"] if r["method"] == name]
            x, y = ([r[key] for r in some] for key in ("bits_per_weight", "output_error"))
            style = "s--" if name.startswith("GPTQ") else "x:" if "per row" in name else "o-"
            color = plt.get_cmap("tab20")(i % 20)
            if some:
                (lines[name],) = ax.plot(x, y, style, color=color, label=name, markersize=4)
        ax.set(yscale="log", xlabel="bits per weight", title=model["title"].partition(" (")[0])
    axes[0].set(ylabel="relative squared error of outputs")
    handles = [lines[name] for name in methods]
    axes[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    path = folder / "methods.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


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
