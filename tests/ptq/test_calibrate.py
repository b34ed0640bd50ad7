"""Statistics of inputs against sums over all of them; quantize_model with calibration."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch import nn

from lowbit import nn as qnn
from lowbit.methods import quantize
from lowbit.ptq import InputStatistics, calibration, collect, quantize_model
from lowbit.ptq import calibration as calibrate_module
from lowbit.ptq import model as model_module
from lowbit.ptq.progress import bar


class Net(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.down(self.drop(torch.relu(self.up(x)))))


BATCHES = [torch.arange(30).view(2, 15), torch.arange(20, 48).view(1, 28)]
LAYERS = ["up", "down", "head"]


def inputs_of(model: Net, name: str) -> torch.Tensor:
    """All rows that enter a layer in evaluation mode, (samples, K) fp64."""
    rows: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].detach().flatten(0, -2).double())
    )
    training = model.training
    model.eval()
    for batch in BATCHES:
        model(batch)
    hook.remove()
    model.train(training)
    return torch.cat(rows)


def test_statistics_are_those_of_all_rows():
    x = torch.randn(4, 50, 12) * torch.linspace(0.1, 9, 12)
    statistics = InputStatistics(12)
    for part in (x[:1], x[1:].half().float(), x[:0]):
        statistics.update(part)
    rows = torch.cat([x[:1], x[1:].half().float()]).flatten(0, 1).double()
    assert statistics.samples == 200
    assert torch.equal(statistics.absmax, rows.abs().amax(0).float())
    torch.testing.assert_close(statistics.absmean, rows.abs().mean(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        statistics.diagonal, rows.square().mean(0).float(), rtol=1e-6, atol=0
    )
    # fp32 sums of 200 products, in 2 parts.
    size = rows.abs().T @ rows.abs() / 200
    error = statistics.hessian - rows.T @ rows / 200
    assert (error.abs() <= 202 * 2**-24 * size).all()
    assert torch.equal(statistics.hessian, statistics.hessian.T)


def test_collecting_leaves_no_hooks():
    model = Net().eval()
    with collect(model, LAYERS) as found:
        model(BATCHES[0])
    model(BATCHES[0])
    assert {name: s.samples for name, s in found.items()} == dict.fromkeys(LAYERS, 30)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), collect(model, LAYERS):
        raise RuntimeError("stop")
    with pytest.raises(AttributeError), collect(model, ["up", "nothing"]):
        pass
    with pytest.raises(TypeError, match="embed must be a linear, got Embedding"):
        collect(model, ["up", "embed"]).__enter__()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_inputs():
    statistics = InputStatistics(4, hessian=False)
    for what in ("hessian", "diagonal", "absmean"):
        with pytest.raises(ValueError, match=r"calibration is empty|was not collected"):
            getattr(statistics, what)
    with pytest.raises(ValueError, match=r"x must have 4 features, got shape \(2, 3\)"):
        statistics.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="holds NaN or inf"):
        statistics.update(torch.tensor([1.0, 2.0, torch.nan, 0.0]))
    assert statistics.samples == 0
    model = Net().eval()
    with torch.no_grad():
        model.up.weight[3] = torch.inf
    with (
        pytest.raises(ValueError, match="down: calibration input holds NaN"),
        collect(model, ["down"]),
    ):
        model(BATCHES[0])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_gptq_of_a_model(one_by_one: bool, monkeypatch: pytest.MonkeyPatch):
    """Each layer is what its inputs make of it; one by one, inputs come from quantized layers."""
    if one_by_one:
        monkeypatch.setattr(calibration, "_HESSIAN_BYTES", 1)
    model = Net().train()
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in LAYERS}
    inputs = {name: inputs_of(model, name) for name in LAYERS}
    state = model.norm.running_mean.clone()
    # One-shot iterables are kept, and tuples and mappings are spread.
    batches = iter([(BATCHES[0],), {"tokens": BATCHES[1]}])
    report = quantize_model(
        model, "int3_g32", method="gptq", calibration=batches, fuse=False, progress=False
    )
    assert [row.name for row in report.layers] == LAYERS
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, state)
    if one_by_one:
        inputs["down"] = inputs_of(model, "down")
        inputs["head"] = inputs_of(model, "head")
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, qnn.QuantLinear)
        x = inputs[name]
        error = {
            "gptq": (layer.quant_tensor().dequantize() - dense[name]).double() @ x.T,
            "rtn": (quantize(dense[name], "int3_g32").dequantize() - dense[name]).double() @ x.T,
        }
        assert error["gptq"].norm() < 0.9 * error["rtn"].norm()
        h = InputStatistics(x.shape[1])
        for part in x.float().split([30, 28]):
            h.update(part)
        wanted = quantize(dense[name], "int3_g32", "gptq", hessian=h.hessian)
        assert torch.equal(layer.quant_tensor().dequantize(), wanted.dequantize())


def test_kmeans_weighs_by_the_inputs():
    model = Net().eval()
    dense, x = model.up.weight.detach().clone(), inputs_of(model, "up")
    with collect(model, ["up"], hessian=False) as found:
        for batch in BATCHES:
            model(batch)
    recipe = {"up": "kmeans2", "embed": "nf4"}
    quantize_model(model, {"up": "kmeans2"}, method="kmeans", calibration=BATCHES, progress=False)
    wanted = quantize(dense, "kmeans2", weights=found["up"].diagonal.expand(dense.shape))
    assert torch.equal(model.up.quant_tensor().dequantize(), wanted.dequantize())
    importance = x.square().mean(0)
    plain = quantize(dense, "kmeans2").dequantize()
    error = [
        ((q - dense).double().square() * importance).sum() for q in (wanted.dequantize(), plain)
    ]
    assert error[0] < error[1]
    model = Net().eval()
    embedding = model.embed.weight.detach().clone()
    options = {"act_order": True}
    quantize_model(
        model, recipe, method="gptq", calibration=BATCHES, options=options, progress=False
    )
    got = model.embed.quant_tensor().dequantize()
    assert torch.equal(got, quantize(embedding, "nf4").dequantize())


@pytest.mark.parametrize(("limit", "hessians"), [(1, [1, 1, 1]), (1 << 31, [3, 2, 1])])
def test_memory_is_bounded_layer_by_layer(limit: int, hessians: list[int], monkeypatch):
    """While a layer is solved, the Hessians of its chunk that are used up are gone, and so are the
    dense weights before it; with chunks of one layer there is never more than one Hessian."""
    model, kept, alive, most = Net().eval(), [], [], []
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LAYERS]

    class Tracked(InputStatistics):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            kept.append(weakref.ref(self))
            most.append(sum(r() is not None for r in kept))

    def counting(*args: object, **kwargs: object) -> object:
        alive.append([sum(r() is not None for r in some) for some in (kept, weights)])
        return quantize(*args, **kwargs)

    monkeypatch.setattr(calibrate_module, "InputStatistics", Tracked)
    monkeypatch.setattr(model_module, "quantize", counting)
    monkeypatch.setattr(calibration, "_HESSIAN_BYTES", limit)
    quantize_model(
        model, "int3_g32", method="gptq", calibration=BATCHES, progress=False, atomic=False
    )
    assert alive == [[n, left] for n, left in zip(hessians, (3, 2, 1), strict=True)]
    assert max(most) == max(hessians)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_progress_of_calibration_and_solving(one_by_one: bool, monkeypatch, capsys):
    """The bar moves for every input that is run and for every layer that is solved."""
    if one_by_one:
        monkeypatch.setattr(calibration, "_HESSIAN_BYTES", 1)
    events: list[str] = []
    totals: list[int] = []

    @contextlib.contextmanager
    def counting(total: int, description: str, shown: bool):
        totals.append(total)
        with bar(total, description, shown) as advance:
            yield lambda: (events.append("step"), advance())

    monkeypatch.setattr(model_module, "bar", counting)
    # rich draws on a terminal alone.
    monkeypatch.setenv("FORCE_COLOR", "1")
    quantize_model(
        Net(), "int3_g32", method="gptq", calibration=BATCHES,
        on_layer=lambda name, *_: events.append(name),
    )  # fmt: skip
    run = ["step"] * len(BATCHES)
    solved = [[name, "step"] for name in LAYERS]
    if one_by_one:
        assert events == [e for layer in solved for e in (*run, *layer)]
    else:
        assert events == [*run, *(e for layer in solved for e in layer)]
    assert totals == [events.count("step")]
    captured = capsys.readouterr()
    assert "quantizing" in captured.err
    assert captured.out == ""


BAD = [
    ({"method": "gptq"}, ValueError, "method 'gptq' needs calibration"),
    ({"method": "gptq", "calibration": []}, ValueError, "calibration is empty"),
    ({"method": "gptq", "calibration": BATCHES[0]}, TypeError, "iterable of .* got Tensor"),
    ({"method": "rtn", "calibration": BATCHES}, ValueError, "'rtn' takes no calibration"),
    ({"calibration": BATCHES}, ValueError, "method None takes no calibration"),
    ({"method": "x", "calibration": BATCHES}, ValueError, "method must be one of .* got 'x'"),
    (
        {"method": "gptq", "calibration": BATCHES, "options": {"order": 1}},
        ValueError,
        "method 'gptq' takes no order",
    ),
    (
        {"method": "gptq", "calibration": [torch.zeros(1, 0, dtype=torch.int64)]},
        ValueError,
        "calibration is empty or 0, for every layer: up: no input has reached it",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_calibration(arguments, error, message):
    model = Net().eval()
    with pytest.raises(error, match=message):
        quantize_model(model, "int4_g32", progress=False, **arguments)
    assert type(model.up) is nn.Linear
