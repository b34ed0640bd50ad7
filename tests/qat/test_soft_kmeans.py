"""Soft k-means: its fixed point, its gradients in every mode, its memory, and what is left after training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import lowbit
from lowbit import qat
from lowbit.qat import soft_kmeans

M, K = 100, 4


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def problem(d: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, first centers, and the gradient of the soft values, fp64."""
    g = torch.Generator().manual_seed(0)
    w, weights = (torch.randn(M, d, generator=g, dtype=torch.float64) for _ in range(2))
    start = torch.linspace(-1.5, 1.5, K, dtype=torch.float64)[:, None].repeat(1, d)
    return w, start + 0.1 * torch.randn(K, d, generator=g, dtype=torch.float64), weights


def gradient(w: Tensor, start: Tensor, weights: Tensor, tau: float, **options: Any) -> Tensor:
    leaf = w.clone().requires_grad_()
    clusters = soft_kmeans.cluster(leaf, start, tau, **{"tolerance": 1e-12, **options})
    (clusters.values * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("distance", soft_kmeans.DISTANCES)
def test_attention(distance: str) -> None:
    w, c, _ = problem(2)
    a = soft_kmeans.attention(w, c, 0.3, distance)
    away = (w[:, None] - c).square().sum(-1)
    away = away.sqrt() if distance == "plain" else away
    torch.testing.assert_close(a, torch.softmax(-away / 0.3, 1))
    torch.testing.assert_close(a.sum(1), torch.ones(M, dtype=torch.float64))


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("distance", soft_kmeans.DISTANCES)
def test_without_temperature_it_is_k_means(distance: str, d: int) -> None:
    """One update is one step of Lloyd, and where scikit-learn's k-means ends it stays."""
    w, c, _ = problem(d)
    nearest = torch.cdist(w, c).argmin(1)
    means = torch.stack([w[nearest == j].mean(0) for j in range(K)])
    torch.testing.assert_close(soft_kmeans.update(w, c, 1e-9, distance), means)
    ended = KMeans(K, init=c.numpy(), n_init=1, tol=0).fit(w.numpy())
    found = soft_kmeans.cluster(w, c, 1e-9, distance=distance, iterations=300, tolerance=1e-12)
    torch.testing.assert_close(found.centers, torch.from_numpy(ended.cluster_centers_))
    assert found.iterations == ended.n_iter_
    torch.testing.assert_close(found.values, found.centers[ended.labels_])


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("distance", soft_kmeans.DISTANCES)
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.02])
def test_implicit_gradient_is_that_of_all_iterations(tau: float, distance: str, d: int) -> None:
    w, start, weights = problem(d)
    # The spectral radius of dF/dC is up to .96 here.
    unrolled = gradient(w, start, weights, tau, distance=distance, mode="unrolled", iterations=600)
    for solver in soft_kmeans.SOLVERS:
        implicit = gradient(
            w,
            start,
            weights,
            tau,
            distance=distance,
            mode="implicit",
            iterations=600,
            solver=solver,
        )
        error = float((implicit - unrolled).norm() / unrolled.norm())
        # The Neumann iteration ends at a relative residual of 1e-6; its error is that over 1 - .96.
        assert error < (1e-6 if solver == "direct" else 5e-5)


@pytest.mark.parametrize("mode", soft_kmeans.MODES)
@pytest.mark.parametrize("distance", soft_kmeans.DISTANCES)
def test_gradient_by_differences(distance: str, mode: str) -> None:
    """Of the values as a function of the weight; jfb only where it is exact, at a low temperature."""
    w, start, weights = problem()
    w, weights = w[:40], weights[:40]
    tau = 1e-3 if mode == "jfb" else 0.2

    def loss(w: Tensor) -> float:
        found = soft_kmeans.cluster(
            w, start, tau, distance=distance, mode=mode, iterations=600, tolerance=1e-13
        )
        return float((found.values * weights).sum())

    got = gradient(
        w, start, weights, tau, distance=distance, mode=mode, iterations=600, tolerance=1e-13
    )
    for i in range(0, 40, 7):
        move = torch.zeros_like(w)
        move[i] = 1e-6
        slope = (loss(w + move) - loss(w - move)) / 2e-6
        assert got[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_jfb_leaves_the_inverse_out() -> None:
    w, start, weights = problem()
    fixed = soft_kmeans.cluster(w, start, 0.1, iterations=600, tolerance=1e-12).centers
    leaf = w.clone().requires_grad_()
    a = soft_kmeans.attention(leaf, soft_kmeans.update(leaf, fixed, 0.1), 0.1)
    (a @ soft_kmeans.update(leaf, fixed, 0.1) * weights).sum().backward()
    jfb = gradient(w, start, weights, 0.1, mode="jfb", iterations=600)
    torch.testing.assert_close(jfb, leaf.grad, rtol=1e-8, atol=1e-10)
    full = gradient(w, start, weights, 0.1, mode="implicit", iterations=600)
    assert torch.cosine_similarity(jfb.flatten(), full.flatten(), 0) < 0.999


def saved_bytes(mode: str, iterations: int) -> int:
    """What autograd keeps for backward, each storage once."""
    w, start, _ = problem()
    storages: dict[int, int] = {}
    held = []

    def note(t: Tensor) -> Tensor:
        held.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        found = soft_kmeans.cluster(
            w.requires_grad_(), start, 0.5, mode=mode, iterations=iterations, tolerance=0.0
        )
    assert found.iterations == iterations
    return sum(storages.values())


def test_memory_does_not_grow_with_the_iterations() -> None:
    for mode in ("implicit", "jfb"):
        assert saved_bytes(mode, 5) == saved_bytes(mode, 50) == saved_bytes("jfb", 1)
    assert saved_bytes("unrolled", 50) > 8 * saved_bytes("unrolled", 5)


@pytest.mark.parametrize("mode", soft_kmeans.MODES)
def test_odd_weights(mode: str) -> None:
    """All alike, fewer values than centers, and a center that nothing attends to."""
    start = torch.tensor([[-1.0], [0.0], [1.0], [1e3]], dtype=torch.float64)
    for w in (torch.zeros(5, 1), torch.tensor([[0.0], [1.0], [1.0]]), torch.full((1, 1), -0.7)):
        leaf = w.double().requires_grad_()
        found = soft_kmeans.cluster(leaf, start, 1e-3, mode=mode)
        torch.testing.assert_close(found.values, leaf)
        assert found.centers[3].item() == 1e3
        found.values.sum().backward()
        assert bool(torch.isfinite(leaf.grad).all())


def test_bad_input() -> None:
    w, c, _ = problem()
    for options, message in (
        ({"mode": "idkm"}, "mode must be one of"),
        ({"distance": "cosine"}, "distance must be one of"),
        ({"solver": "cg"}, "solver must be one of"),
        ({"iterations": 0}, "iterations must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_kmeans.cluster(w, c, 0.1, **options)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        soft_kmeans.cluster(w, c, 0)
    with pytest.raises(TypeError, match="one floating dtype"):
        soft_kmeans.cluster(w.float(), c, 0.1)
    with pytest.raises(ValueError, match=r"weight must be a non-empty"):
        soft_kmeans.cluster(w[:0], c, 0.1)
    with pytest.raises(ValueError, match=r"centers must have shape \(k, 1\)"):
        soft_kmeans.cluster(w, c.expand(K, 2), 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        soft_kmeans.cluster(w * torch.nan, c, 0.1)
    with pytest.raises(ValueError, match="bits must be one of"):
        qat.SoftKMeans(w, 7)
    with pytest.raises(ValueError, match="dim must divide the 100 weights, got 3"):
        qat.SoftKMeans(w, 2, 3)
    with pytest.raises(ValueError, match="at least 256 vectors for 256 centers, got 50"):
        qat.SoftKMeans(w, 8, 2)


def test_the_quantizer_is_soft_in_training_and_hard_in_evaluation() -> None:
    w = torch.randn(8, 24)
    quantizer = qat.SoftKMeans(w, 2, tau=0.2)
    soft = quantizer(w)
    assert len(soft.unique()) > 4
    # It goes on where it was.
    moved = quantizer.centers.clone()
    quantizer(w)
    assert not torch.equal(quantizer.centers, moved)
    hard = quantizer.eval()(w)
    values, codes = soft_kmeans.harden(w.view(-1, 1), quantizer.centers)
    assert torch.equal(hard.view(-1, 1), values)
    qt = quantizer.quant_tensor(w)
    assert torch.equal(qt.dequantize(), hard)
    assert torch.equal(qt.unpack().flatten().long(), codes)
    assert torch.equal(lowbit.linear(torch.eye(24), qt), hard.T)


def test_vectors_train_and_harden(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(8, 24, requires_grad=True)
    quantizer = qat.SoftKMeans(w, 3, 2, tau=0.05)
    assert quantizer.centers.shape == (8, 2)
    zeros = qat.SoftKMeans(torch.zeros(4, 4), 1, 2)
    assert torch.equal(zeros(torch.zeros(4, 4)), torch.zeros(4, 4))
    assert torch.equal(quantizer.centers, qat.SoftKMeans(w, 3, 2, tau=0.05).centers)
    optimizer = torch.optim.Adam([w], lr=0.1)
    x, target = torch.randn(30, 24), torch.randn(30, 8)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (x @ quantizer(w).T - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    hard = quantizer.eval()(w.detach())
    assert len(hard.view(-1, 2).unique(dim=0)) <= 8
    with pytest.raises(NotImplementedError, match="vectors of dim 2 have no packed kernel"):
        quantizer.quant_tensor(w)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="lowbit\\[qat\\]"):
        qat.SoftKMeans(w, 3, 2)
