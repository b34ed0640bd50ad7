"""The report of a quantization: the numbers that the plots draw, and the files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from lowbit.formats import FORMATS, parse
from lowbit.methods import quantize
from lowbit.ptq import allocate, plots, quantize_model


@pytest.mark.parametrize("name", ["nf4", "uint4_g32", "uint4_zfloat", "q4_1", "e4m3", "int2_a8"])
def test_histograms_are_in_units_of_the_codes(name):
    """A weight that a format holds exactly has all its mass in the bins of the codes' values."""
    qt = quantize(torch.randn(40, 64), name)
    found = plots.histogram(qt.dequantize(), qt)
    assert found.format == name
    width = float(found.edges[1] - found.edges[0])
    assert float(found.density.sum() * width) == pytest.approx(1, rel=1e-5)
    values = torch.tensor([v for v in qt.format.values() if abs(v) < float("inf")])
    assert torch.equal(found.values, values.sort().values)
    assert torch.equal(found.low, found.high)
    for edge in found.edges[:-1][found.density > 0]:
        distance = (values - float(edge) - width / 2).abs().min()
        # Half a bin, and what scales and zeros lose in fp32.
        assert distance <= width / 2 + 1e-4 * float(values.abs().max())


def test_histograms_of_fitted_tables():
    weight = torch.randn(40, 64)
    whole = quantize(weight, "kmeans2")
    assert torch.equal(plots.histogram(weight, whole).values, whole.table.sort().values)
    rows = quantize(weight, "kmeans2_pr")
    found = plots.histogram(weight, rows)
    ordered = rows.table.sort(1).values
    for i in range(4):
        below = (ordered[:, i] < found.low[i]).sum()
        assert below <= 0.05 * 40
        assert (ordered[:, i] <= found.values[i]).sum() >= 20
        assert (ordered[:, i] > found.high[i]).sum() <= 0.05 * 40
    constant = plots.histogram(torch.zeros(4, 32), quantize(torch.zeros(4, 32), "kmeans2"))
    assert constant.density.isfinite().all()


def test_report_files(tmp_path):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(50)))
    histograms = plots.WeightHistograms()
    report = quantize_model(
        model, {"0": "e4m3", ".*": "nf4_g32"}, progress=False, on_layer=histograms
    )
    assert list(histograms) == [row.name for row in report.layers]
    files = plots.write_report(tmp_path / "new" / "folder", report, histograms=histograms)
    assert sorted(files) == sorted((tmp_path / "new" / "folder").iterdir())
    assert {file.name for file in files} == {
        "report.json", "report.txt", "error_per_layer.png", "error_over_bits.png", "codebooks.png",
    }  # fmt: skip
    assert json.loads(files[0].read_text())["report"] == json.loads(json.dumps(report.to_dict()))
    assert files[1].read_text() == f"{report}\n"


def test_error_per_layer_shows_the_worst():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(50)))
    report = quantize_model(model, {"7|9": "int2_g32", ".*": "int4_g32"}, progress=False)
    ax = plots.layer_errors(report.layers).axes[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(labels) == len(ax.patches) == 40
    assert {"7", "9"} <= set(labels)
    assert labels == sorted(labels, key=int)
    lengths = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in ax.patches}
    errors = {row.name: row.relative_error for row in report.layers}
    assert [lengths[i] for i in range(40)] == pytest.approx([errors[name] for name in labels])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["int4_g32", "int2_g32"]
    # A format that none of the shown layers has gets no entry of another one's colour.
    mixed = quantize_model(
        nn.Sequential(*(nn.Linear(32, 32) for _ in range(60))),
        {r"[1-5]\d": "int2_g32", ".*": "int8_g32"},
        progress=False,
    )
    ax = plots.layer_errors(mixed.layers).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["int2_g32"]


def test_error_over_bits_shows_candidates_frontier_and_choice():
    weights = {str(i): torch.randn(32, 64) * 2.0**i for i in range(4)}
    found = allocate(weights, ["int2_g32", "int4_g32"], 3.5, progress=False)
    point = (found.bits_per_weight, found.error)
    ax = plots.error_over_bits(found.uniform, found.frontier, point).axes[0]
    lines = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
    assert lines[0] == list(found.frontier)
    assert lines[1:] == [[p] for p in (*found.uniform.values(), point)]
    assert [t.get_text() for t in ax.texts] == ["int2_g32", "int4_g32"]
    assert ax.get_yscale() == "log"
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["best allocation", "one for all weights", "chosen"]


def test_one_panel_for_each_codebook():
    weight = torch.randn(32, 64)
    names = ["kmeans3", "nf4", "e4m3", "kmeans2_pr"]
    figure = plots.codebooks({n: plots.histogram(weight, quantize(weight, n)) for n in names})
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 4
    for ax, name in zip(panels, names, strict=True):
        format = parse(name)
        assert ax.get_title().startswith(f"{name}\n{name}, ")
        # 256 lines would be a wall.
        assert len(ax.lines) == (0 if name == "e4m3" else format.num_codes)
    assert panels[0].lines[0].get_xdata()[0] == pytest.approx(
        float(quantize(weight, "kmeans3").table.min())
    )
    assert FORMATS["e4m3"].num_codes > 64
