"""Fisher information of outputs: against its closed form, and against KL divergences that are measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.quantize import allocate, output_gradients, quantize

WIDTH, CLASSES = 32, 20


class Classifier(nn.Module):
    """Every linear writes to a residual stream; `gain` says how much of it the head sees."""

    def __init__(self, gains: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in gains)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.gains = gains

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + gain * torch.tanh(self.drop(layer(x)).mul_(1.0))
        return self.head(x)


BATCHES = [torch.arange(40).view(2, 20), (torch.arange(50).view(1, 50),)]
NAMES = ["layers.0", "layers.1", "head"]


def test_of_logits_it_is_the_closed_form():
    """For z itself g = onehot(y) - p, so that g_n^2 is (1 - p_n)^2 where y = n and else p_n^2."""
    model = Classifier().eval()
    found = output_gradients(model, ["head"], BATCHES, seed=7)["head"]
    total = torch.zeros(CLASSES, dtype=torch.float64)
    expected = torch.zeros(CLASSES, dtype=torch.float64)
    for i, batch in enumerate((BATCHES[0], BATCHES[1][0])):
        p = model(batch).detach().flatten(0, -2).softmax(-1)
        y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7 + i))
        onehot = torch.nn.functional.one_hot(y[:, 0], CLASSES)
        total += (onehot - p).double().square().sum(0)
        expected += (p * (1 - p)).double().sum(0)
    torch.testing.assert_close(found, total / (2 * 90), rtol=1e-5, atol=1e-9)
    # Over the draws its mean is p (1 - p): 90 of them scatter by about a tenth of the sum.
    assert math.isclose(float(found.sum()), float(expected.sum()) / 180, rel_tol=0.3)


def test_nothing_of_the_model_changes():
    model = Classifier().train()
    model.embed.weight.requires_grad_(False)
    wanting = [p.requires_grad for p in model.parameters()]
    first = output_gradients(model, NAMES, BATCHES)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    again = output_gradients(model, NAMES, BATCHES)
    other = output_gradients(model, NAMES, BATCHES, seed=1)
    assert all(torch.equal(first[n], again[n]) for n in NAMES)
    assert not any(torch.equal(first[n], other[n]) for n in NAMES)
    assert {n: tuple(t.shape) for n, t in first.items()} == {
        "layers.0": (WIDTH,), "layers.1": (WIDTH,), "head": (CLASSES,),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_predicted_errors_are_the_divergence(name):
    """In nats: within a factor of 2 of the KL that one layer in 4 bits makes."""
    model = Classifier().eval()
    with torch.no_grad():
        model.head.weight *= 4
    batches = [torch.randint(50, (8, 50)) for _ in range(8)]
    found = allocate(model, ["int4_g32"], 8, skip=(), calibration=batches, progress=False)
    predicted = {c.names[0]: c.option.error for c in found.choices}[name]
    with torch.no_grad():
        dense = [model(b).double().log_softmax(-1) for b in batches]
        layer = model.get_submodule(name)
        layer.weight.copy_(quantize(layer.weight, "int4_g32").dequantize())
        after = [model(b).double().log_softmax(-1) for b in batches]
    kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(dense, after, strict=True)]
    measured = float(torch.stack(kl).mean())
    assert 0.5 < predicted / measured < 2


def test_bits_go_where_the_output_looks():
    """The layer with the larger output error has hardly any say, and objective "output" is misled."""
    model = Classifier(gains=(1.0, 0.01)).eval()
    with torch.no_grad():
        model.layers[1].weight *= 5
    candidates = ["int2_g32", "int4_g32"]
    chosen = {}
    for objective in ("kl", "output"):
        found = allocate(
            model, candidates, 3.5, skip=("head",), calibration=BATCHES, objective=objective,
            progress=False,
        )  # fmt: skip
        chosen[objective] = [c.option.rule.format.name for c in found.choices]
    assert chosen == {"kl": candidates[::-1], "output": candidates}


class Unused(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)


def test_bad_outputs():
    class Pair(nn.Sequential):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return super().forward(x), 3

    x = torch.randn(4, WIDTH)
    with pytest.raises(TypeError, match="must give logits for objective 'kl', got tuple"):
        output_gradients(Pair(nn.Linear(WIDTH, 2)), ["0"], [x])
    model = nn.Sequential(nn.Linear(WIDTH, 2))
    with pytest.raises(ValueError, match="hold NaN or inf"):
        output_gradients(model, ["0"], [x * math.inf])
    with pytest.raises(ValueError, match=r"logits of shape \(0, 2\) are empty"):
        output_gradients(model, ["0"], [x[:0]])
    with pytest.raises(ValueError, match="extra: no gradient has reached this layer"):
        output_gradients(Unused(), ["head", "extra"], BATCHES)
    assert not any(module._forward_hooks for module in model.modules())
