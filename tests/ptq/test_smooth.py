"""AWQ and SmoothQuant: the product stays, errors fall, scales are those of the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit import int8
from lowbit.methods import quantize
from lowbit.ptq import InputStatistics
from lowbit.ptq.smooth import awq_scales, fold, smooth_scales


class ShiftedNorm(nn.Module):
    """Multiplies by 1 + weight, as some language models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


def outliers(samples: int = 200, k: int = 64) -> torch.Tensor:
    x = torch.randn(samples, k)
    x[:, ::16] *= 30
    return x


@pytest.mark.parametrize(
    "previous", [nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)]
)
def test_folding_changes_no_product(previous: nn.Module):
    previous = previous.double()
    with torch.no_grad():
        for p in previous.parameters():
            p.copy_(torch.randn_like(p))
    linears = [nn.Linear(64, n).double() for n in (5, 32)]
    x, scales = outliers().double(), torch.rand(64) * 10 + 0.1
    before, hidden = [linear(previous(x)) for linear in linears], previous(x)
    fold(previous, linears, scales)
    torch.testing.assert_close(previous(x), hidden / scales.double(), rtol=1e-10, atol=1e-10)
    for linear, y in zip(linears, before, strict=True):
        torch.testing.assert_close(linear(previous(x)), y, rtol=1e-10, atol=1e-10)


def test_smoothquant():
    x, weights = outliers(), [torch.randn(8, 64), torch.randn(16, 64)]
    statistics = InputStatistics(64, hessian=False)
    statistics.update(x)
    for alpha in (0.0, 0.3, 1.0):
        s = smooth_scales(statistics.absmax, weights, alpha)
        columns = torch.cat(weights).abs().amax(0)
        torch.testing.assert_close(s, x.abs().amax(0) ** alpha / columns ** (1 - alpha))
    s = smooth_scales(statistics.absmax, weights)

    def error(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, scale = int8.quantize(x)
        made = quantize(w, "int8_row").dequantize()
        return ((q * scale[:, None]) @ made.T - x @ w.T).norm()

    assert error(x / s, weights[0] * s) < 0.5 * error(x, weights[0])
    assert smooth_scales(torch.zeros(64), [torch.zeros(2, 64)]).isfinite().all()


@pytest.mark.parametrize("name", ["int3_g32", "nf3_g32", "kmeans2"])
def test_awq(name: str):
    x, weights = outliers(), [torch.randn(8, 64), torch.randn(16, 64)]
    statistics = InputStatistics(64)
    statistics.update(x)
    h = statistics.hessian
    s = awq_scales(statistics.absmean, h, weights, name, grid=5)

    def error(s: torch.Tensor) -> float:
        made = [quantize(w * s, name).dequantize() / s for w in weights]
        return sum(float(((m - w) @ x.T).norm() ** 2) for m, w in zip(made, weights, strict=True))

    assert error(s) < 0.8 * error(torch.ones(64))
    tried = []
    for a in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        t = statistics.absmean**a
        tried.append(t / (t.max() * t.min()).sqrt())
    assert any(torch.equal(s, t) for t in tried)
    # Sums in fp32 against fp64: equal to 1e-4.
    assert error(s) <= min(map(error, tried)) * 1.0001


def test_bad_arguments():
    linear, norm, s = nn.Linear(4, 3), nn.LayerNorm(4), torch.ones(4)
    shifted = ShiftedNorm(4)
    for arguments, error, message in (
        ((nn.ReLU(), [linear], s), TypeError, "previous must be a norm .* got ReLU"),
        ((norm, [nn.ReLU()], s), TypeError, "linears must be nn.Linear, got ReLU"),
        ((norm, [], s), ValueError, "linears must hold at least one"),
        ((norm, [nn.Linear(5, 3)], s), ValueError, "must have 4 input features, got 5"),
        ((nn.LayerNorm(5), [linear], s), ValueError, r"4 output features, .* shape \(5,\)"),
        ((norm, [linear], s * 0), ValueError, "scales must be .* positive"),
        ((norm, [linear], s * torch.nan), ValueError, "scales must be .* finite"),
        ((shifted, [linear], s * 2), ValueError, r"\(ShiftedNorm\) does not multiply by its w"),
    ):
        with pytest.raises(error, match=message):
            fold(*arguments)
    assert (shifted.weight == 0).all()
    w = torch.ones(2, 4)
    for call, message in (
        (lambda: smooth_scales(s, []), "at least one"),
        (lambda: smooth_scales(s[:3], [w]), r"absmax must have shape \(4,\), got \(3,\)"),
        (lambda: smooth_scales(-s, [w]), "absmax must be finite and not negative"),
        (lambda: smooth_scales(s, [w, w.T]), r"weights\[1\] must be \(N, 4\), got shape \(4, 2\)"),
        (lambda: smooth_scales(s, [w], 1.5), "alpha must be 0 to 1, got 1.5"),
        (lambda: awq_scales(s, torch.eye(3), [w], "int4"), r"hessian must have shape \(4, 4\)"),
        (lambda: awq_scales(s, torch.eye(4), [w], "int4", grid=0), "grid must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
