"""Fisher information of outputs: against its closed form, and against KL divergences that are measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.methods import quantize
from lowbit.nn.names import Rule
from lowbit.ptq import allocate, output_fisher, quantize_model

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
    """For the head g = onehot(y) - p, and its input is what its hook sees."""
    model = Classifier().eval()
    found = output_fisher(model, ["head"], BATCHES, seed=7)["head"]
    rows: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    inputs = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    outputs = torch.zeros(CLASSES, dtype=torch.float64)
    mean = 0.0
    for i, batch in enumerate((BATCHES[0], BATCHES[1][0])):
        p = model(batch).detach().flatten(0, -2).softmax(-1)
        y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7 + i))
        square = (nn.functional.one_hot(y[:, 0], CLASSES) - p).double().square()
        x = rows[i].flatten(0, -2).double()
        inputs += x.T @ (square.sum(1, keepdim=True) * x)
        outputs += square.sum(0)
        mean += float((p * (1 - p)).sum())
    torch.testing.assert_close(found.inputs.double(), inputs / 180, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.outputs, outputs / outputs.sum(), rtol=1e-5, atol=1e-9)
    # Over the draws the mean of g_n^2 is p_n (1 - p_n): 90 of them scatter by about a tenth.
    assert math.isclose(float(outputs.sum()), mean, rel_tol=0.3)


def test_nothing_of_the_model_changes():
    model = Classifier().train()
    model.embed.weight.requires_grad_(False)
    wanting = [p.requires_grad for p in model.parameters()]
    first = output_fisher(model, NAMES, BATCHES)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    again = output_fisher(model, NAMES, BATCHES)
    other = output_fisher(model, NAMES, BATCHES, seed=1)
    for name in NAMES:
        assert torch.equal(first[name].inputs, again[name].inputs)
        assert torch.equal(first[name].outputs, again[name].outputs)
        assert not torch.equal(first[name].inputs, other[name].inputs)
        assert first[name].inputs.shape == (WIDTH, WIDTH)
        assert float(first[name].outputs.sum()) == pytest.approx(1)


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


def test_gptq_candidates_learn_from_the_inputs():
    """Their Hessian is not that of the errors: candidates are those of `quantize_model`."""
    model = Classifier().eval()
    rules = [Rule("int2_g32", "gptq"), Rule("int4_g32", "gptq")]
    found = allocate(model, rules, 3.5, skip=(), calibration=BATCHES, progress=False)
    fisher = output_fisher(model, NAMES, BATCHES)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in NAMES}
    quantize_model(model, {"layers|head": rules[0]}, skip=(), calibration=BATCHES, progress=False)
    for c in found.choices:
        name = c.names[0]
        e = model.get_submodule(name).quant_tensor().dequantize().double() - dense[name].double()
        f = fisher[name]
        exact = float((((e @ f.inputs.double()) * e).sum(1) * f.outputs).sum())
        # W - W^ is rounded to fp32 there.
        assert math.isclose(c.options[0].error, exact, rel_tol=1e-6)


def test_a_layer_whose_output_does_not_matter():
    model = Classifier(gains=(1.0, 0.0)).eval()
    found = output_fisher(model, NAMES, BATCHES)["layers.1"]
    assert not found.inputs.any()
    assert not found.outputs.any()
    choices = allocate(
        model, ["int2_g32", "int8_g32"], 8.5, skip=("head",), calibration=BATCHES, progress=False
    ).choices
    assert [c.option.rule.format.name for c in choices] == ["int8_g32", "int2_g32"]


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
        output_fisher(Pair(nn.Linear(WIDTH, 2)), ["0"], [x])
    model = nn.Sequential(nn.Linear(WIDTH, 2))
    with pytest.raises(ValueError, match="hold NaN or inf"):
        output_fisher(model, ["0"], [x * math.inf])
    with pytest.raises(ValueError, match=r"logits of shape \(0, 2\) are empty"):
        output_fisher(model, ["0"], [x[:0]])
    with pytest.raises(ValueError, match=r"logits of .* do not depend on the linears"):
        output_fisher(Unused(), ["extra"], BATCHES)

    class InPlace(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            return self[0](y) + y.mul_(2)

    with pytest.raises(ValueError, match="0: the model changes the input of this layer in place"):
        output_fisher(InPlace(nn.Linear(WIDTH, WIDTH)), ["0"], [x])
    assert not any(module._forward_hooks for module in model.modules())
