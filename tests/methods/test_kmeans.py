"""k-means tables are optimal: brute force over partitions, scikit-learn, the Lloyd-Max quantizer."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
import threadpoolctl
import torch
from interrupts import assert_stops
from oracle import assert_codes_are_best, normal

from lowbit import _C, reference
from lowbit.formats import Format
from lowbit.methods import fitting, quantize
from lowbit.weights.quantized import QuantTensor


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problems are tiny: threads of scikit-learn would only wait for each other."""
    with threadpoolctl.threadpool_limits(1):
        yield


def inertia(values: np.ndarray, centers: np.ndarray, weights: np.ndarray | None = None) -> float:
    distance = (values.astype(np.float64)[:, None] - centers.astype(np.float64)[None]) ** 2
    return float((distance.min(1) * (1 if weights is None else weights)).sum())


def best_partition(values: np.ndarray, weights: np.ndarray, k: int) -> float:
    """The smallest inertia over every way to cut the sorted values in k."""
    best = math.inf
    for cuts in itertools.combinations(range(1, len(values)), k - 1):
        total = 0.0
        for begin, end in itertools.pairwise((0, *cuts, len(values))):
            v, w = values[begin:end].astype(np.float64), weights[begin:end]
            if w.sum():
                total += (w * (v - (w * v).sum() / w.sum()) ** 2).sum()
        best = min(best, total)
    return best


def test_kmeans_against_every_partition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, k = int(rng.integers(1, 11)), int(rng.integers(1, 6))
        values = np.sort(rng.standard_normal(n).round(int(rng.integers(0, 4)))).astype(np.float32)
        weights = rng.integers(0, 4, n).astype(np.float64) if rng.random() < 0.5 else None
        centers = _C.kmeans_1d(values, weights, k)
        assert (np.diff(centers) >= 0).all()
        counted = np.ones(n) if weights is None or not weights.any() else weights
        best = best_partition(values, counted, min(k, n))
        # Centers are rounded to fp32: at most 2^-24 of a value off, which is squared.
        assert inertia(values, centers, counted) <= best * (1 + 1e-9) + 1e-12


def test_kmeans_with_few_distinct_values():
    values = np.array([-1, -1, 0.5, 0.5, 0.5, 2], dtype=np.float32)
    assert _C.kmeans_1d(values, None, 5).tolist() == [-1, 0.5, 2, 2, 2]
    weights = np.array([1, 1, 0, 0, 0, 1], dtype=np.float64)
    assert _C.kmeans_1d(values, weights, 3).tolist() == [-1, 2, 2]
    assert _C.kmeans_1d(values, weights * 0, 3).tolist() == [-1, 0.5, 2]


def test_kmeans_far_from_zero():
    """The spread is 1e-5 of the values: sums of squares about 0 would lose it."""
    rng = np.random.default_rng(1)
    values = np.sort(rng.integers(0, 200, 500)).astype(np.float32)
    far = _C.kmeans_1d(values + np.float32(2**23), None, 7)
    near = _C.kmeans_1d(values, None, 7)
    np.testing.assert_allclose(far - np.float32(2**23), near, atol=0.5)
    exact = inertia(values, near)
    assert inertia(values.astype(np.float64), (far - 2.0**23).astype(np.float64)) <= exact * 1.01


def test_kmeans_rows_are_independent():
    rng = np.random.default_rng(2)
    values = np.sort(rng.standard_normal((9, 50)).astype(np.float32), 1)
    weights = rng.random((9, 50))
    for w in (None, weights):
        expected = [_C.kmeans_1d(v, None if w is None else w[i], 4) for i, v in enumerate(values)]
        for threads in (1, 2, 16):
            np.testing.assert_array_equal(_C.kmeans_rows(values, w, 4, threads), expected)


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_kmeans_is_never_worse_than_scikit_learn(k: int, weighted: bool):
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(k)
    values = np.sort(rng.standard_t(4, 600)).astype(np.float32)
    weights = rng.random(600) if weighted else None
    ours = inertia(values, _C.kmeans_1d(values, weights, k), weights)
    theirs = cluster.KMeans(k, n_init=10, random_state=0).fit(
        values[:, None], sample_weight=weights
    )
    assert ours <= theirs.inertia_ * (1 + 1e-6)


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.36338), (2, 0.117482), (3, 0.034548), (4, 0.009501)]
)
def test_kmeans_of_a_normal_weight_is_the_lloyd_max_quantizer(bits: int, distortion: float):
    """Max (1960), table I: the least mean squared error for a normal variable with 2^bits
    levels.
    """
    n = 1 << 14
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(n).double() + 0.5) / n)
    weight = quantiles.float()[torch.randperm(n)].view(64, -1)
    format = Format.lut(bits=bits, scale=None, group=None)
    error = (quantize(weight, format).dequantize() - weight).double().square().mean()
    # The sample stands for the density up to its own spacing, about 1 % in the tails at 16 levels.
    assert math.isclose(error, distortion, rel_tol=0.01)


def points_of(qt: QuantTensor, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The points that a table was fitted to, and scale^2, both (N, K)."""
    if qt.scales is None:
        return weight.numpy(), np.ones(weight.shape)
    group = reference.group_index(qt.format, weight.shape[1], weight.device)
    scale = reference.effective_scales(qt)[:, group]
    return (weight / scale).numpy(), scale.double().square().numpy()


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("scale", ["fp16", None, "e8m0", "dq8"])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_fitted_tables_are_optimal(scope: str, scale: str | None, importance: bool):
    """For the scales that are stored, no table of scikit-learn has a smaller weighted error of
    W.
    """
    cluster = pytest.importorskip("sklearn.cluster")
    weight = normal(3, 150) * torch.tensor([[1.0], [3.0], [0.2]])
    weights = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) if importance else None
    format = Format.lut(bits=2, group=60, scale=scale, table_scope=scope)
    qt = quantize(weight, format, weights=weights).validate()
    assert_codes_are_best(qt, weight)
    points, square = points_of(qt, weight)
    counts = square * (weights.double().numpy() if importance else 1)
    error = (qt.dequantize().double() - weight.double()).square().numpy()
    error = error * (weights.double().numpy() if importance else 1)
    rows = [slice(0, 3)] if scope == "tensor" else [slice(i, i + 1) for i in range(3)]
    columns = (
        [slice(0, 60), slice(60, 120), slice(120, 150)] if scope == "group" else [slice(0, 150)]
    )
    for part in itertools.product(rows, columns):
        v, c = points[part].reshape(-1, 1), counts[part].ravel()
        fit = cluster.KMeans(4, n_init=4, random_state=0).fit(v, sample_weight=c)
        # fp32 entries and fp32 products against float64.
        assert error[part].sum() <= inertia(v.ravel(), fit.cluster_centers_.ravel(), c) * (1 + 1e-5)


def test_importance_moves_the_table():
    """Weights of importance 0 do not count; a table whose weights are all 0 is fitted to all of
    them alike.
    """
    weight = torch.cat([torch.full((2, 30), 5.0), normal(2, 30).sign()], 1)
    weights = (weight.abs() < 2).float()
    format = Format.lut(bits=1, scale=None, group=None, table_scope="row")
    assert quantize(weight, format, weights=weights).table.tolist() == [[-1, 1]] * 2
    plain = quantize(weight, format).table
    assert torch.equal(quantize(weight, format, weights=weights * 0).table, plain)
    assert plain.max() == 5


def test_importance_of_the_columns():
    """(K,) is (N, K) with equal rows."""
    weight, columns = normal(5, 70), torch.rand(70)
    for scope in ("tensor", "row", "group"):
        format = Format.lut(bits=2, group=20, table_scope=scope)
        qt = quantize(weight, format, weights=columns)
        full = quantize(weight, format, weights=columns.repeat(5, 1))
        assert torch.equal(qt.table, full.table)
        assert not torch.equal(qt.table, quantize(weight, format).table)
    with pytest.raises(ValueError, match=r"weights must have the shape .* got \(5,\)"):
        quantize(weight, format, weights=columns[:5])


def test_kmeans_of_long_rows_against_scikit_learn():
    """4096 values, 16 centers: never worse than the best of ten starts, and far faster."""
    cluster = pytest.importorskip("sklearn.cluster")
    rows = np.sort(normal(4, 4096).numpy(), 1)
    start = time.perf_counter()
    centers = _C.kmeans_rows(rows, None, 16, 1)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    fits = [cluster.KMeans(16, n_init=10, random_state=0).fit(row[:, None]) for row in rows]
    theirs = time.perf_counter() - start
    for row, center, fit in zip(rows, centers, fits, strict=True):
        assert inertia(row, center) <= fit.inertia_ * (1 + 1e-6)
    # Over 20 on an idle machine; other work may take away a part of either time.
    assert theirs > 5 * ours, f"{theirs / ours:.1f} times faster"


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize("importance", [None, "some", "none"])
def test_bins_cost_next_to_nothing(outliers: bool, importance: str | None, monkeypatch):
    """Above MAX_POINTS weights are binned; against the exact solution on all of them."""
    weight = normal(40, 500)
    if outliers:
        weight[::10, ::100] = 1000
        weight[1, 1] = -30000
    weights = None
    if importance:
        weights = torch.rand(weight.shape) * (importance == "some")
    format = Format.lut(bits=4, scale=None, group=None)
    exact = quantize(weight, format, weights=weights).dequantize()
    monkeypatch.setattr(fitting, "MAX_POINTS", 16384)
    binned = quantize(weight, format, weights=weights).dequantize()
    count = 1 if weights is None or not weights.any() else weights
    error, least = (((w - weight).double().square() * count).sum() for w in (binned, exact))
    # A bin is rms / 8192 wide near 0, and the outliers make rms 200: 0.026, an eighth of the distance of
    # two entries at most. A cut that is off by a bin costs the square of that, below 1 %.
    assert least <= error * (1 + 1e-9)
    assert error <= least * 1.01
    if outliers and importance != "none":
        assert (binned[::10, ::100] - 1000).abs().max() < 1


def test_long_rows_are_binned(monkeypatch: pytest.MonkeyPatch):
    weight = normal(3, 3000)
    format = Format.lut(bits=3, scale=None, group=None, table_scope="row")
    exact = quantize(weight, format)
    monkeypatch.setattr(fitting, "MAX_POINTS", 2048)
    binned = quantize(weight, format)
    # Bins are 1/1024 wide in v / (|v| + rms), 4e-3 of a standard deviation at 1; entries are means
    # of many.
    assert (binned.table - exact.table).abs().max() < 0.02
    errors = [(q.dequantize() - weight).square().sum() for q in (binned, exact)]
    assert errors[0] <= errors[1] * 1.001


def test_a_format_can_be_made_for_every_scope_and_width():
    for bits, scope in itertools.product((1, 2, 3, 4, 5, 6, 8), ("tensor", "row", "group")):
        format = Format.lut(bits=bits, group=20, table_scope=scope)
        assert_codes_are_best(quantize(normal(3, 70), format).validate(), normal(3, 70))


@pytest.mark.parametrize("rows", [1, 3])
def test_an_interrupt_stops_it(rows: int):
    setup = f"""
    values = np.sort(np.random.default_rng(0).standard_normal((3_000_000,), np.float32))
    rows = np.tile(values[: len(values) // {rows}], ({rows}, 1))
    """
    call = "_C.kmeans_1d(values, None, 256)" if rows == 1 else "_C.kmeans_rows(rows, None, 256, 2)"
    assert_stops(call, setup)
