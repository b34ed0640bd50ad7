"""GPTQ's damping "auto": the one with the least error of outputs on inputs held out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.methods import gptq, quantize
from lowbit.ptq import InputStatistics, quantize_model
from lowbit.ptq.calibration import SplitStatistics

K = 64
FORMATS = ("int3_g32", "kmeans3_g32_dq8", "kmeans4_g16_dq8", "nf4_g32")


def mixed(samples: int, seed: int) -> torch.Tensor:
    """Rows (samples, K) of a few directions and noise; the same ones for every seed."""
    mix = (
        torch.randn(K, K, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.01, 2, K)[:, None]
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, K, generator=generator)
    return torch.randn(samples, K, generator=generator) @ mix / K**0.5 + 0.02 * noise


def moment(x: torch.Tensor, of: int) -> torch.Tensor:
    return x.double().T @ x.double() / of


def loss(weight: torch.Tensor, made: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - made).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("samples", [48, 2000])
def test_it_is_the_best_of_four_on_what_is_held_out(format, samples):
    weight, x = torch.randn(32, K), mixed(samples, 2)
    rest, held = x[: samples * 3 // 4], x[samples * 3 // 4 :]
    losses = {}
    for damping in (0.01, 0.05, 0.1, 0.3):
        qt = quantize(weight, format, "gptq", hessian=moment(rest, samples), damping=damping)
        losses[damping] = loss(weight, qt.dequantize(), held)
    best = min(losses, key=lambda damping: losses[damping])
    hessian, held_out = moment(x, samples), moment(held, samples)
    expected = quantize(weight, format, "gptq", hessian=hessian, damping=best)
    made = quantize(weight, format, "gptq", hessian=hessian, damping="auto", held_out=held_out)
    assert all(torch.equal(t, expected.tensors[key]) for key, t in made.tensors.items())


def test_few_tokens_want_more_damping_than_many(monkeypatch):
    """And it pays on tokens that nothing has seen."""
    weight, fresh = torch.randn(64, K), mixed(4000, 9)
    tried: list[float] = []
    factor = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda h, d: tried.append(d) or factor(h, d))
    chosen, errors = {}, {}
    for samples in (40, 4000):
        x = mixed(samples, 3)
        hessian = moment(x, samples)
        held = moment(x[samples * 3 // 4 :], samples)
        how = {"auto": {"damping": "auto", "held_out": held}, "0.01": {"damping": 0.01}}
        for name, options in how.items():
            made = quantize(weight, "int3_g32", "gptq", hessian=hessian, **options)
            errors[samples, name] = loss(weight, made.dequantize(), fresh)
            chosen.setdefault(samples, tried[-1])
    assert chosen[40] > chosen[4000]
    assert errors[40, "auto"] < errors[40, "0.01"]


@pytest.mark.parametrize("format", [f for f in FORMATS if "dq8" in f])
def test_two_levels_of_scales(format):
    """Their second level is fixed before the columns, so no group is fitted again."""
    weight, x = torch.randn(32, K), mixed(2000, 4)
    made = quantize(weight, format, "gptq", hessian=moment(x, len(x))).validate()
    plain = quantize(weight, format)
    assert loss(weight, made.dequantize(), x) < 0.6 * loss(weight, plain.dequantize(), x)


def test_a_quarter_of_the_rows_is_held_out():
    statistics = SplitStatistics(K)
    parts = [mixed(n, n) for n in (8, 101, 1, 2)]
    held = [parts[0][6:], parts[1][76:]]
    for part in parts:
        statistics.update(part[None])
    # Of 109 rows 27 are held out, a quarter of the calls' rows: the next ones go there.
    held += [parts[2]]
    count = sum(map(len, parts))
    rows = torch.cat(parts)
    torch.testing.assert_close(
        statistics.relative_hessian.double(), moment(rows, count), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        statistics.relative_held_out.double(), moment(torch.cat(held), count), rtol=1e-5, atol=1e-6
    )
    diagonal = moment(rows, count).diagonal().float()
    torch.testing.assert_close(statistics.relative_diagonal, diagonal, rtol=1e-5, atol=1e-6)


def test_parts_of_other_magnitudes_have_one_unit():
    statistics, x = SplitStatistics(2), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    # On both sides of where inputs are divided.
    x = torch.cat([x[:3] * 2.0**37, x[3:] * 2.0**38])
    statistics.update(x)
    whole = InputStatistics(2)
    whole.update(x)
    torch.testing.assert_close(
        statistics.relative_hessian, whole.relative_hessian, rtol=1e-6, atol=0
    )


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.second = nn.Linear(K, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_model():
    """The first layer sees the inputs as given."""
    model, batches = Layers(), [mixed(40, seed)[None] for seed in range(3)]
    weight = model.first.weight.detach().clone()
    rows, held = (torch.cat([b[0, begin:] for b in batches]) for begin in (0, 30))
    quantize_model(
        model, "int3_g32", method="gptq", options={"damping": "auto"}, calibration=batches, progress=False
    )  # fmt: skip
    expected = quantize(
        weight, "int3_g32", "gptq", hessian=moment(rows, 120), damping="auto", held_out=moment(held, 120)
    )  # fmt: skip
    torch.testing.assert_close(model.first.weight, expected.dequantize(), rtol=1e-6, atol=1e-6)


def test_too_few_rows():
    message = "for every layer: first: of the rows held out no input has reached it in calibration"
    with pytest.raises(ValueError, match=message):
        quantize_model(
            Layers(), "int3_g32", method="gptq", options={"damping": "auto"}, calibration=[mixed(1, 0)],
            progress=False,
        )  # fmt: skip


EYE = torch.eye(K)
BAD = {
    "word": ({"damping": "best"}, TypeError, "damping of method 'gptq' must be float, got 'best'"),
    "missing": ({"damping": "auto"}, ValueError, "damping 'auto' needs held_out"),
    "number": ({"held_out": EYE}, ValueError, r"held_out is for damping 'auto', got damping 0\.01"),
    "kind": ({"damping": "auto", "held_out": [1]}, TypeError, "held_out must be a floating tensor, got list"),
    "shape": ({"damping": "auto", "held_out": torch.eye(3)}, ValueError, r"held_out of a weight .*\(3, 3\)"),
    "all": ({"damping": "auto", "held_out": EYE}, ValueError, "hessian without held_out is zero"),
    "more": ({"damping": "auto", "held_out": 2 * EYE}, ValueError, "hessian without held_out must be positive"),
    "nan": ({"damping": "auto", "held_out": EYE * torch.nan}, ValueError, "held_out must be finite"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        quantize(torch.randn(4, K), "int3_g32", "gptq", hessian=EYE, **options)


def test_other_words_reach_no_method():
    with pytest.raises(ValueError, match="damping must be a number or 'auto', got 'best'"):
        gptq.quantize(torch.randn(4, K), "int3_g32", hessian=EYE, damping="best")
