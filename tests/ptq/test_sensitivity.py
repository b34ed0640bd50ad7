"""The diagonal Fisher matrix against gradients sample by sample; quantize_model weighs by it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowbit.methods import quantize
from lowbit.ptq import fisher_diagonal, quantize_model


class Net(nn.Module):
    """Two linears, one of them used twice, and a frozen norm; returns a loss if given a target."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.twice = nn.Linear(16, 16, bias=False)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(3, 3)
        self.norm.requires_grad_(False)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> object:
        y = self.drop(self.norm(self.up(x)))
        y = self.twice(torch.tanh(self.twice(y)))
        loss = None if target is None else (y - target).square().mean()
        return SimpleNamespace(y=y, loss=loss)


SAMPLES = [{"x": torch.randn(4, 12), "target": torch.randn(4, 16)} for _ in range(3)]


def expected(model: Net, name: str) -> torch.Tensor:
    model.eval()
    weight = model.get_submodule(name).weight
    squares = [
        torch.autograd.grad(model(**sample).loss, weight)[0].double().square() for sample in SAMPLES
    ]
    return sum(squares) / len(SAMPLES)


def test_mean_squared_gradients():
    model = Net().train()
    model.norm.eval()
    held = torch.ones_like(model.up.weight)
    model.up.weight.grad = held
    found = fisher_diagonal(model, SAMPLES, ["up", "twice"])
    assert model.training
    assert not model.norm.training
    assert model.up.weight.grad is held
    assert model.twice.weight.grad is None
    assert model.up.bias.grad is None
    assert [p.requires_grad for p in model.norm.parameters()] == [False, False]
    assert model.up.bias.requires_grad
    for name, got in found.items():
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected(model, name), rtol=1e-5, atol=1e-12)
    assert not model.up.weight._post_accumulate_grad_hooks


def test_a_loss_of_ones_own_and_tied_weights():
    model = Net()
    model.again = nn.Linear(16, 16, bias=False)
    model.again.weight = model.twice.weight
    inputs = [sample["x"] for sample in SAMPLES]
    found = fisher_diagonal(
        model, inputs, ["twice", "again"], loss=lambda out, x: out.y.sum() * x.sum()
    )
    assert torch.equal(found["twice"], found["again"])
    assert found["twice"].any()


def test_quantize_model_weighs_by_it():
    model = Net()
    found = fisher_diagonal(model, SAMPLES, ["up"])
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ("up", "twice")}
    quantize_model(
        model, "kmeans2_pr", method="kmeans", sensitivities=found, skip=["unused"], progress=False
    )
    wanted = quantize(dense["up"], "kmeans2_pr", weights=found["up"]).dequantize()
    plain = quantize(dense["up"], "kmeans2_pr").dequantize()
    assert torch.equal(model.up.quant_tensor().dequantize(), wanted)
    error = [((w - dense["up"]).square() * found["up"]).sum() for w in (wanted, plain)]
    assert error[0] < error[1]
    other = model.twice.quant_tensor().dequantize()
    assert torch.equal(other, quantize(dense["twice"], "kmeans2_pr").dequantize())


BAD = [
    ({"batches": []}, ValueError, "calibration is empty"),
    ({"names": ["norm"]}, TypeError, r"norm must have a weight \(N, K\), got LayerNorm"),
    ({"names": ["nothing"]}, AttributeError, "nothing"),
    ({"names": ["unused"]}, ValueError, "one number that depends on the named weights"),
    ({"batches": [SAMPLES[0]["x"]]}, TypeError, "the model returns no loss"),
    ({"loss": lambda out, _: out.y}, ValueError, r"loss must be one number .* shape \(4, 16\)"),
    ({"loss": lambda out, _: 1.0}, TypeError, "loss must be a tensor, got float"),
    ({"loss": lambda out, _: out.loss.detach()}, ValueError, "requires_grad False"),
    ({"loss": lambda out, _: out.loss * torch.inf}, ValueError, "the gradient holds NaN or inf"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(arguments, error, message):
    given = {"batches": SAMPLES, "names": ["up"], **arguments}
    model = Net()
    with pytest.raises(error, match=message):
        fisher_diagonal(model, given.pop("batches"), given.pop("names"), **given)
    assert model.up.bias.requires_grad
    assert not model.up.weight._post_accumulate_grad_hooks


BAD_SENSITIVITY = [
    ({"method": "rtn"}, "method 'rtn' takes no sensitivities"),
    ({}, "method None takes no sensitivities"),
    (
        {"method": "kmeans", "calibration": [SAMPLES[0]]},
        "give calibration or sensitivities, not both",
    ),
    ({"method": "kmeans", "sensitivities": {"down": torch.ones(1)}}, "sensitivities names 'down'"),
    (
        {"method": "kmeans", "sensitivities": {"up": torch.ones(1)}},
        "up: weights must have the shape",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_SENSITIVITY, ids=[b[1] for b in BAD_SENSITIVITY]
)
def test_bad_sensitivity(arguments, message):
    given = {"sensitivities": {"up": torch.ones(16, 12)}, **arguments}
    with pytest.raises(ValueError, match=message):
        quantize_model(Net(), "kmeans2_pr", progress=False, **given)
