"""Divergence measured by running the model with each candidate: against fp64, and what `allocate` does with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.methods import quantize
from lowbit.ptq import allocate, quantize_model
from lowbit.ptq.divergence import divergences

TOKENS = torch.arange(24).view(2, 12)
CANDIDATES = ["km2_g16", "km3", "km4"]
NAMES = ["layers.0", "layers.1", "layers.2"]


class Net(nn.Module):
    """Layers that matter in very different degrees; the last two have one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.again = nn.Linear(64, 64, bias=False)
        self.again.weight = self.layers[2].weight
        self.lm_head = nn.Linear(64, 24, bias=False)

    def forward(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(tokens)
        for size, layer in zip((0.01, 1, 3, 1), (*self.layers, self.again), strict=True):
            x = x + size * torch.tanh(layer(x))
        return self.lm_head(x)


def exact(model: nn.Module, name: str, weight: torch.Tensor, keep: torch.Tensor) -> float:
    """In fp64."""
    wide, changed = Net().double(), Net().double()
    wide.load_state_dict(model.state_dict())
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.get_parameter(f"{name}.weight").copy_(weight)
        p, q = (m(TOKENS).log_softmax(-1)[keep] for m in (wide, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("masked", [False, True])
def test_against_fp64(masked: bool):
    model = Net().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    mask = torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    keep = mask.bool() if masked else torch.ones_like(TOKENS, dtype=torch.bool)
    batches = [{"tokens": t[None], "attention_mask": m[None]} if masked else t[None]
               for t, m in zip(TOKENS, mask, strict=True)]  # fmt: skip
    made = [(name, [quantize(before[f"{name}.weight"], f) for f in CANDIDATES]) for name in NAMES]
    runs: list[None] = []
    found = divergences(model, made, batches, lambda: runs.append(None))
    assert len(runs) == 2 * (1 + 9)
    for (name, candidates), values in zip(made, found, strict=True):
        for qt, value in zip(candidates, values, strict=True):
            # Probabilities in fp32 are off by about 1e-6 of themselves, of which most cancels out.
            want = exact(model, name, qt.dequantize(), keep)
            assert math.isclose(value, want, rel_tol=1e-3, abs_tol=1e-6)
            assert value > 0
    assert model.training
    assert model.again.weight is model.layers[2].weight
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_the_dense_weight_makes_none():
    model = Net()
    with torch.no_grad():
        model.layers[1].weight.copy_(quantize(model.layers[1].weight, "km4").dequantize())
    codes = quantize(model.layers[1].weight, "int8_g32")
    assert divergences(model, [("layers.1", [])], [TOKENS]) == [[]]
    (values,) = divergences(model, [("layers.1", [codes])], [TOKENS])
    assert values[0] < 1e-4


def test_weights_are_put_back_where_the_model_fails():
    model = Net()
    weight = model.layers[0].weight.detach().clone()
    made = quantize(weight, "km4")
    made.tensors["table"].fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 12, 24\) are empty, or hold NaN"):
        divergences(model, [("layers.0", [made])], [TOKENS])
    assert torch.equal(model.layers[0].weight, weight)
    with pytest.raises(TypeError, match="must give logits"):
        divergences(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), [], [torch.zeros(1, 2)])


def test_allocate_by_what_is_measured():
    model = Net()
    dense = {name: model.get_parameter(f"{name}.weight").detach() for name in NAMES}
    made = [(name, [quantize(w, f) for f in CANDIDATES]) for name, w in dense.items()]
    how = {"calibration": [TOKENS], "objective": "measured", "progress": False}
    found = allocate(model, CANDIDATES, 3.6, **how)
    assert [c.names for c in found.choices] == [(NAMES[0],), (NAMES[1],), (NAMES[2], "again")]
    want = divergences(model, made, [TOKENS])
    assert [[o.error for o in c.options] for c in found.choices] == want
    # A method that learns has seen the inputs.
    learned = allocate(model, CANDIDATES, 3.6, method="search", **how)
    assert [[o.error for o in c.options] for c in learned.choices] != want
    # The first layer hardly matters.
    formats = [c.option.rule.format.name for c in found.choices]
    assert formats[0] == "km2_g16"
    assert "km4" in formats[1:]
    assert found.bits_per_weight <= 3.6
    report = quantize_model(
        model, found.recipe, progress=False, calibration=[TOKENS], method="search"
    )
    assert report.nbytes == found.nbytes


def test_importance_and_measured_divergence_together():
    model = Net()
    names = [*NAMES, "again"]
    counts = {name: torch.linspace(0.01, 1, 64).roll(i) for i, name in enumerate(names)}
    how = {"importance": counts, "progress": False}
    found = allocate(model, CANDIDATES, 3.6, objective="measured", calibration=[TOKENS], **how)
    made = [
        (n, [quantize(model.get_parameter(f"{n}.weight").detach(), f, "search", weights=counts[n])
             for f in CANDIDATES])
        for n in NAMES
    ]  # fmt: skip
    want = divergences(model, made, [TOKENS])
    assert [[o.error for o in c.options] for c in found.choices] == want
    # Without calibration it is the error that counts as importance says, in all places of a weight.
    found = allocate(model, CANDIDATES, 3.6, **how)
    for choice, (_, candidates) in zip(found.choices, made, strict=True):
        weight = model.get_parameter(f"{choice.names[0]}.weight").detach().double()
        for option, qt in zip(choice.options, candidates, strict=True):
            square = (qt.dequantize().double() - weight).square()
            error = sum(float((square * counts[name]).sum()) for name in choice.names)
            assert math.isclose(option.error, error, rel_tol=1e-9)
            assert option.rule.method == "search"
    report = quantize_model(model, found.recipe, importance=counts, progress=False)
    assert report.nbytes == found.nbytes
