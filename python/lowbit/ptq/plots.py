"""The report of a quantization as files: tables, JSON, and plots by matplotlib.

`WeightHistograms` is given to `quantize_model` or `quantize_file` as `on_layer` and keeps of every
weight what its plot needs.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import reference
from lowbit.files import write_atomically
from lowbit.methods import grid
from lowbit.ptq.allocation import Allocation
from lowbit.ptq.report import LayerReport, Report
from lowbit.weights.quantized import QuantTensor

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise ImportError(
        "matplotlib is not installed; plots need: pip install 'lowbit[plots]'"
    ) from None

_DPI = 110
# What still can be read in one figure.
_MOST_BARS, _MOST_PANELS, _MOST_LINES = 40, 6, 64
_BINS = 160


@dataclass(frozen=True)
class WeightHistogram:
    """How the weights of one layer, in units of their scales, lie between the values of its codes.

    Attributes:
        edges, density: of the bins, (bins + 1,) and (bins,); weights beyond count in the outer ones.
        values: (E,) fp32, sorted; of tables per row or group the medians.
        low, high: the same for the 5th and the 95th percentile of the tables.
    """

    format: str
    edges: Tensor
    density: Tensor
    values: Tensor
    low: Tensor
    high: Tensor


class WeightHistograms(dict[str, WeightHistogram]):
    """Histograms by the name of the layer."""

    def __call__(self, name: str, weight: Tensor, qt: QuantTensor) -> None:
        """Adds a weight (N, K) and its quantization."""
        self[name] = histogram(weight, qt)


@torch.no_grad()
def histogram(weight: Tensor, qt: QuantTensor) -> WeightHistogram:
    """The histogram of one weight."""
    low, values, high = _values(qt)
    margin = 0.15 * float(values[-1] - values[0]) or 1.0
    start, end = float(values[0]) - margin, float(values[-1]) + margin
    scales, counts = reference.effective_scales(qt), values.new_zeros(_BINS)
    for rows, w in grid.slices(weight):
        zero = reference.effective_zeros(qt, rows)
        offset = qt.format.zero == "min"
        scale = None if scales is None else scales[rows]
        ratio = grid.scaled(w, qt.format, scale, zero if offset else None)
        if zero is not None and not offset:
            ratio = ratio + zero[:, reference.group_index(qt.format, w.shape[1], w.device)]
        counts += torch.histc(ratio.clamp(start, end), _BINS, start, end).cpu()
    width = (end - start) / _BINS
    edges = torch.linspace(start, end, _BINS + 1, dtype=torch.float32, device="cpu")
    density = counts / (counts.sum() * width)
    return WeightHistogram(qt.format.name, edges, density, values, low, high)


def _values(qt: QuantTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Percentiles 5, 50 and 95 of the tables' values, (E,) each."""
    if qt.table is None:
        values = grid.fixed_table(qt.format, torch.device("cpu")).sort().values
        values = values[values.isfinite()]
        return values, values, values
    tables = qt.table.flatten(0, -2) if qt.table.dim() > 1 else qt.table[None]
    ordered = tables.cpu().sort(dim=1).values.sort(dim=0).values
    at = [round(share * (len(ordered) - 1)) for share in (0.05, 0.5, 0.95)]
    return ordered[at[0]], ordered[at[1]], ordered[at[2]]


def write_report(
    folder: str | os.PathLike[str],
    report: Report,
    allocation: Allocation | None = None,
    histograms: Mapping[str, WeightHistogram] | None = None,
) -> list[Path]:
    """Writes report.json and report.txt, plots as PNG, and with an allocation recipe.toml.

    Args:
        folder: made if needed; files of the same names are replaced.
        report: what `quantize_model` returned.
        allocation: where its recipe came from.
        histograms: of the same layers.

    Returns:
        The paths.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    data: dict[str, object] = {"report": report.to_dict()}
    text = f"{report}\n"
    if allocation is not None:
        data["allocation"] = allocation.to_dict()
        text += f"\n{allocation}\n"
        allocation.recipe.save(path / "recipe.toml")
    encoded = f"{json.dumps(data, indent=1)}\n".encode()
    write_atomically(path / "report.json", lambda f: f.write(encoded))
    write_atomically(path / "report.txt", lambda f: f.write(text.encode()))
    figures = {"error_per_layer": layer_errors(report.layers)}
    if allocation is not None:
        figures["error_over_bits"] = error_over_bits(
            allocation.uniform,
            allocation.frontier,
            (allocation.bits_per_weight, allocation.error),
        )
    else:
        figures["error_over_bits"] = layers_over_bits(report.layers)
    if histograms:
        worst = sorted(report.layers, key=lambda row: -row.relative_error)
        names = [row.name for row in worst if row.name in histograms][:_MOST_PANELS]
        figures["codebooks"] = codebooks({name: histograms[name] for name in names})
    for name, figure in figures.items():
        draw = functools.partial(
            figure.savefig, format="png", dpi=_DPI, metadata={"Software": None}
        )
        write_atomically(path / f"{name}.png", draw)
    names = ["report.json", "report.txt", *(f"{name}.png" for name in figures)]
    return [path / name for name in (*names, *(["recipe.toml"] if allocation else []))]


def layer_errors(rows: Sequence[LayerReport]) -> Figure:
    """The relative error of every layer as a bar, one colour for each format; of many layers those
    with the largest errors.
    """
    shown = sorted(rows, key=lambda row: -row.relative_error)[:_MOST_BARS]
    shown = [row for row in rows if row in shown]
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(shown)), layout="constrained")
    ax = figure.subplots()
    for i, format in enumerate(_formats(rows)):
        some = [(at, row) for at, row in enumerate(shown) if row.format == format]
        if some:
            places, lengths = [at for at, _ in some], [row.relative_error for _, row in some]
            ax.barh(places, lengths, color=f"C{i}", label=format)
    ax.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=8)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    every = f"{len(rows)} layers"
    few = every if len(shown) == len(rows) else f"the worst {len(shown)} of {every}"
    ax.set(xlabel="relative error of the weight, ||W - Ŵ|| / ||W||", title=f"Error, {few}")
    ax.grid(axis="x", alpha=0.3)
    _legend(ax)
    return figure


def layers_over_bits(rows: Sequence[LayerReport]) -> Figure:
    """Every layer as a point: stored bits per weight and relative error."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for i, format in enumerate(_formats(rows)):
        some = [row for row in rows if row.format == format]
        bits = [8 * row.nbytes / math.prod(row.shape) for row in some]
        errors = [row.relative_error for row in some]
        ax.scatter(bits, errors, color=f"C{i}", alpha=0.7, label=format)
    ax.set(
        xlabel="stored bits per weight, scales and tables included",
        ylabel="relative error, ||W - Ŵ|| / ||W||",
        title="Error over bits, one point per layer",
        ylim=(0, None),
    )
    ax.grid(alpha=0.3)
    _legend(ax)
    return figure


def error_over_bits(
    points: Mapping[str, tuple[float, float]],
    frontier: Sequence[tuple[float, float]] = (),
    chosen: tuple[float, float] | None = None,
) -> Figure:
    """Total errors over average bits per weight.

    Args:
        points: (bits, error) by name, as of formats or methods that all weights get.
        frontier: (bits, error) of the best allocations.
        chosen: the allocation that was chosen.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    if frontier:
        best = list(zip(*frontier, strict=True))
        ax.step(best[0], best[1], where="post", color="C0", label="best allocation")
    for name, (bits, error) in points.items():
        ax.plot(bits, error, "o", color="C1", label="one for all weights")
        ax.annotate(name, (bits, error), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if chosen is not None:
        ax.plot(*chosen, "*", color="C3", markersize=14, label="chosen")
    positive = [e for _, e in (*points.values(), *frontier) if e > 0]
    if positive and max(positive) > 5 * min(positive):
        ax.set_yscale("log")
    ax.set(
        xlabel="stored bits per weight, scales and tables included",
        ylabel="error, summed over layers",
        title="Error over bits",
    )
    ax.margins(x=0.12)
    ax.grid(alpha=0.3, which="both")
    _legend(ax)
    return figure


def codebooks(histograms: Mapping[str, WeightHistogram]) -> Figure:
    """One panel for each layer: the histogram of its weights and the values of its codes."""
    columns = min(3, len(histograms))
    lines = -(-len(histograms) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, (name, found) in zip(axes, histograms.items(), strict=False):
        ax.stairs(found.density, found.edges, fill=True, color="C0", alpha=0.45)
        if len(found.values) <= _MOST_LINES:
            for low, value, high in zip(found.low, found.values, found.high, strict=True):
                ax.axvspan(float(low), float(high), color="C3", alpha=0.12, linewidth=0)
                ax.axvline(float(value), color="C3", linewidth=1)
        ax.set_title(f"{name}\n{found.format}, {len(found.values)} values", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_yticks([])
    for ax in axes[len(histograms) :]:
        ax.set_visible(False)
    figure.supxlabel("weight / scale (bars), values of the codes (lines)", fontsize=9)
    return figure


def _formats(rows: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(row.format for row in rows))


def _legend(ax: Any) -> None:
    """A legend in which every label comes once, if there is any."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))
        ax.legend(unique.values(), unique.keys(), fontsize=8)
