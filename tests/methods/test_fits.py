"""Tables fitted by Lloyd's algorithm, from densities and by quantiles: against scikit-learn, scipy, the
exact tables and the numbers of the papers.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_codes_are_best, normal

import lowbit
from lowbit.explanation import REFERENCE
from lowbit.formats import Format
from lowbit.methods import fitting, grid, kde, quantize
from lowbit.weights.quantized import QuantTensor

FITS = ("distq", "kde", "kmeans", "lloyd")
SCOPES = ("tensor", "row", "group")


def plain(bits: int, scope: str = "tensor", group: int | None = None) -> Format:
    """A format whose tables hold the weights themselves."""
    return Format.lut(bits=bits, group=group, scale=None, table_scope=scope)


def error(weight: torch.Tensor, qt: QuantTensor) -> float:
    """The squared error over the squared weight."""
    w = weight.double()
    return float((qt.dequantize().double() - w).square().sum() / w.square().sum())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", FITS)
def test_every_method_makes_a_weight_that_runs(method: str, scope: str):
    for scale in (None, "fp16", "e8m0"):
        format = Format.lut(bits=3, group=32, scale=scale, table_scope=scope)
        weight = normal(5, 80) + 0.1
        qt = quantize(weight, format, method).validate()
        assert_codes_are_best(qt, weight)
        assert error(weight, qt) < 0.15
        x = torch.eye(80)
        assert lowbit.explain(x, qt).selected != REFERENCE
        assert torch.equal(lowbit.linear(x, qt).T, qt.dequantize())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", FITS)
def test_degenerate_weights(method: str, scope: str):
    """Equal weights, zeros, one weight, and fewer distinct values than entries."""
    for format in (plain(3, scope, 16), Format.lut(bits=3, group=16, table_scope=scope)):
        for weight in (torch.full((2, 40), -0.75), torch.zeros(2, 40), torch.ones(1, 1)):
            assert torch.equal(quantize(weight, format, method).validate().dequantize(), weight)
        pair = torch.tensor([-1.0, 0.5]).repeat(3, 24)
        qt = quantize(pair, format, method).validate()
        # Densities and fitted distributions do not know that there is nothing between the two.
        assert error(pair, qt) < (1e-12 if method in ("kmeans", "lloyd") else 0.05)


@pytest.mark.parametrize("method", FITS)
def test_a_seed_gives_one_result(method: str):
    weight, format = normal(40, 100), plain(2)
    options = {"init": "kmeans++"} if method == "lloyd" else {}
    first, again = (quantize(weight, format, method, **options) for _ in range(2))
    assert torch.equal(first.table, again.table)
    if method in ("kde", "lloyd"):
        other = quantize(weight, format, method, seed=1, **options)
        assert not torch.equal(first.table, other.table)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("init", ["linear", "density", "forgy", "kmeans++"])
def test_lloyd_ends_where_scikit_learn_does(init: str, weighted: bool):
    """From the same start, without a tolerance, both stop at the same table."""
    cluster = pytest.importorskip("sklearn.cluster")
    weight = normal(3, 500, seed=2)
    weights = torch.rand(3, 500) if weighted else None
    format = plain(3, "row")
    given = {} if weights is None else {"weights": weights}
    start = quantize(weight, format, "lloyd", init=init, iterations=0, **given).table
    table = quantize(
        weight, format, "lloyd", init=init, iterations=1000, tolerance=0, **given
    ).table
    for i, row in enumerate(weight.double().numpy()):
        fit = cluster.KMeans(
            8, init=start[i].double().numpy()[:, None], n_init=1, max_iter=1000, tol=0
        )
        with warnings.catch_warnings():
            # It stops when no label changes, and warns that it did not reach the tolerance.
            warnings.simplefilter("ignore")
            fit.fit(row[:, None], sample_weight=None if weights is None else weights[i].numpy())
        np.testing.assert_allclose(table[i], np.sort(fit.cluster_centers_[:, 0]), rtol=1e-5)


def test_lloyd_starts():
    weight = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 70]])

    def start(init: str, **more: object) -> torch.Tensor:
        return quantize(weight, plain(2, "row"), "lloyd", init=init, iterations=0, **more).table

    np.testing.assert_allclose(start("linear")[0], [0, 70 / 3, 140 / 3, 70], rtol=1e-6)
    assert start("density").tolist() == [[0, 2, 4, 6]]
    heavy = (weight == 70) * 8.0 + 1
    assert start("density", weights=heavy).tolist() == [[1, 5, 70, 70]]
    for seed in range(5):
        for init in ("forgy", "kmeans++"):
            drawn = start(init, seed=seed)[0].tolist()
            # Different points of the weight, in order; the far one is drawn next to always.
            assert sorted(set(drawn)) == drawn
            assert set(drawn) <= set(weight[0].tolist())
            assert init == "forgy" or 70 in drawn
    few = quantize(weight[:, :2], plain(2, "row"), "lloyd", init="forgy", iterations=0).table
    assert set(few[0].tolist()) == {0, 1}


def test_an_entry_without_points_stays():
    weight = torch.cat([normal(1, 200) * 0.1, torch.tensor([[100.0]])], 1)
    table = quantize(weight, plain(2, "row"), "lloyd", init="linear").table[0]
    low = float(weight.min())
    np.testing.assert_allclose(
        table[1:3], [low + (100 - low) / 3, low + (100 - low) * 2 / 3], rtol=1e-6
    )
    assert table[3] == 100


def test_lloyd_of_many_points_is_binned(monkeypatch: pytest.MonkeyPatch):
    weight = normal(30, 300)
    exact = quantize(weight, plain(3), "lloyd", init="density").table
    monkeypatch.setattr(fitting, "MAX_POINTS", 4096)
    binned = quantize(weight, plain(3), "lloyd", init="density").table
    # Bins are 1/2048 wide in v / (|v| + rms): 2e-3 at 1 of 1, and both stop within the tolerance.
    assert (binned - exact).abs().max() < 0.02


def laplace(n: int, k: int, seed: int) -> torch.Tensor:
    uniform = torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    side = uniform - 0.5
    return (-side.sign() * torch.log1p(-2 * side.abs())).float()


@pytest.mark.parametrize("draw", [normal, laplace])
def test_kde_of_a_thousandth_is_within_5_percent_of_kmeans(draw):
    weight = draw(1000, 1000, seed=5)
    best = error(weight, quantize(weight, plain(4), "kmeans"))
    for seed in range(3):
        for solver in kde.SOLVERS:
            got = error(weight, quantize(weight, plain(4), "kde", solver=solver, seed=seed))
            # The table of 65536 bins may be a hair worse than the best one.
            assert best * (1 - 1e-3) <= got <= 1.05 * best


def test_kde_counts_and_tails(monkeypatch: pytest.MonkeyPatch):
    """Above the least sample: points that count 0 are not seen, and far ones are, in parts or not."""
    weight = normal(60, 200)
    weight[3, 7], weight[50, 100] = 1e4, -3e3
    for scope in ("tensor", "row"):
        format = plain(3, scope)
        monkeypatch.setattr(kde, "MIN_SAMPLE", 50)
        table = quantize(weight, format, "kde", sample=0.01).table.view(-1, 8)
        assert table.max() == 1e4
        assert table.min() == -3e3
        monkeypatch.setattr(grid, "_SLICE_WEIGHTS", 200 * 7)
        parts = quantize(weight, format, "kde", sample=0.01).table.view(-1, 8)
        assert scope == "row" or torch.equal(parts, table)
        monkeypatch.undo()
    zeros = normal(40, 64) * (torch.arange(40) % 4 == 0)[:, None]
    qt = quantize(zeros, "kmeans4", "kde").validate()
    assert error(zeros, qt) < 0.02


def test_kde_without_tails_is_the_density_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    weight = normal(1, 900)
    problems = fitting.Problems(900, lambda: [(weight, None)])
    drawn = kde._draw(problems, 1.0, 0.0, 1, torch.Generator())
    points, count = drawn.density(2048, 0.2)
    # The bandwidth of scipy is relative to the deviation with n - 1.
    factor = 0.2 * math.sqrt(899 / 900)
    density = stats.gaussian_kde(weight[0].double().numpy(), bw_method=factor)
    x, step = points[0].numpy(), float(points[0, 1] - points[0, 0])
    low, high = x[0] - step / 2, x[-1] + step / 2
    reflected = density(x) + density(2 * low - x) + density(2 * high - x)
    # Linear binning moves the variance of a kernel by step^2 / 6, 1e-4 of it here.
    np.testing.assert_allclose(count[0] / 900 / step, reflected, rtol=2e-3, atol=1e-4)
    assert math.isclose(float(count.sum()), 900, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("distribution", "expected"), [("normal", 0.0210), ("student_t", 0.0210), ("beta", 0.0225)]
)
def test_distq_errors_for_normal_blocks(distribution: str, expected: float):
    """Relative mean squared error of N(0, 1) in blocks of 64 with 4 bits."""
    weight = normal(2000, 64)
    format = plain(4, "group", 64)
    got = error(weight, quantize(weight, format, "distq", distribution=distribution))
    # 2000 blocks: the error of the mean is about 1 %.
    assert math.isclose(got, expected, rel_tol=0.03)
    stretched = quantize(weight, format, "distq", distribution=distribution, tail="absmax")
    assert error(weight, stretched) < 0.5 * got
    assert torch.equal(stretched.table.amax(-1)[:, 0], weight.amax(1))
    assert torch.equal(stretched.table.amin(-1)[:, 0], weight.amin(1))


def test_distq_students_t_fits_heavy_tails():
    generator = np.random.default_rng(0)
    weight = torch.from_numpy(generator.standard_t(5, (100, 1024))).float()
    errors = {
        d: error(weight, quantize(weight, plain(4, "row"), "distq", distribution=d, tail="absmax"))
        for d in ("normal", "student_t")
    }
    assert errors["student_t"] < 0.9 * errors["normal"]


@pytest.mark.parametrize("distribution", ["normal", "student_t", "beta"])
def test_distq_tables_are_the_quantiles_of_scipy(distribution: str):
    stats = pytest.importorskip("scipy.stats")
    weight = torch.from_numpy(np.random.default_rng(1).standard_t(5, (1, 500)) + 0.3).float()
    x, p = weight[0].double().numpy(), (np.arange(8) + 0.5) / 8
    mean, variance, absmax = x.mean(), x.var(), np.abs(x).max()
    if distribution == "normal":
        source = stats.norm(mean, math.sqrt(variance))
    elif distribution == "student_t":
        nu = min(max(4 + 6 / stats.kurtosis(x), 4.5), 100)
        source = stats.t(nu, mean, math.sqrt(variance * (nu - 2) / nu))
    else:
        m, v = (mean / absmax + 1) / 2, variance / absmax**2 / 4
        total = m * (1 - m) / v - 1
        source = stats.beta(m * total, (1 - m) * total, -absmax, 2 * absmax)
    table = quantize(weight, plain(3, "row"), "distq", distribution=distribution).table[0]
    np.testing.assert_allclose(table, source.ppf(p), rtol=1e-5, atol=1e-6)


BAD = [
    ("lloyd", {"init": "random"}, "init must be one of"),
    ("lloyd", {"iterations": -1}, "iterations must be at least 0"),
    ("lloyd", {"tolerance": -0.1}, "tolerance must be finite and at least 0"),
    ("lloyd", {"weights": -torch.ones(4)}, "importance must be finite"),
    ("kde", {"solver": "em"}, "solver must be one of"),
    ("kde", {"sample": 0}, "sample must be above 0"),
    ("kde", {"sample": 1.5}, "sample must be above 0"),
    ("kde", {"tails": 1}, "tails must be from 0"),
    ("kde", {"strata": 0}, "strata must be at least 1"),
    ("kde", {"grid": 1}, "grid must be at least 2"),
    ("kde", {"bandwidth": math.inf}, "bandwidth must be finite"),
    ("distq", {"distribution": "cauchy"}, "distribution must be one of"),
    ("distq", {"tail": "mean"}, "tail must be one of"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_arguments(method: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        quantize(normal(2, 4), plain(2), method, **options)


@pytest.mark.parametrize("method", FITS)
def test_formats_with_values_are_refused(method: str):
    with pytest.raises(ValueError, match=f"method '{method}' fits tables and format 'nf4' has"):
        quantize(normal(2, 4), "nf4", method)
