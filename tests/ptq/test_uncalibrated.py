"""Layers that calibration says nothing of are quantized without it, with a note; inputs of any size say the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.methods import quantize  # fmt: skip
from lowbit.ptq import (
    InputStatistics,
    allocate,
    fisher_diagonal,
    output_fisher,
    quantize_llm_int8,
    quantize_model,
)


class Moe(nn.Module):
    """A mixture whose router never picks the last expert; it is not called, or with no rows."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, -2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0).long().eq(i).nonzero().flatten()
            if self.called or len(rows):
                y[rows] = expert(x[rows])
        return self.out(y)


class Dead(nn.Module):
    """A layer whose inputs are all 0, behind a ReLU that is never active."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 8)
        nn.init.constant_(self.experts[0].bias, -1e4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dead = torch.relu(self.experts[0](x))
        return self.out(self.experts[1](x) + self.experts[2](dead))


MODELS = {"not called": lambda: Moe(False), "no rows": lambda: Moe(True), "zeros": Dead}
BATCHES = [torch.randn(2, 8, 32) for _ in range(3)]
SILENT = "experts.2"
WARNING = rf"^calibration says nothing of {SILENT}: the rows"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("method", "format"),
    [("gptq", "int4_g32"), ("gptq", "kmeans3"), ("kmeans", "kmeans3_pr"), ("lloyd", "kmeans2")],
)
def test_a_method_that_learns(kind, method, format):
    model = MODELS[kind]().eval()
    dense = model.get_submodule(SILENT).weight.detach().clone()
    with pytest.warns(UserWarning, match=WARNING) as caught:
        report = quantize_model(model, format, method=method, calibration=BATCHES, progress=False)
    assert len(caught) == 1
    used = None if method == "gptq" else method
    wanted = quantize(dense, format, used).dequantize()
    assert torch.equal(model.get_submodule(SILENT).quant_tensor().dequantize(), wanted)
    notes = {row.name: row.note for row in report.layers}
    why = "its inputs are all 0" if kind == "zeros" else "no input has reached it"
    by = used or ("kmeans" if format == "kmeans3" else "rtn")
    note = f"{why} in calibration: quantized without calibration, by {by!r}"
    assert {name: text for name, text in notes.items() if text} == {SILENT: note}
    assert f"{SILENT}: {note}" in str(report)
    assert len(notes) == 4
    assert model(BATCHES[0]).isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "kl"])
def test_observers(kind, observer):
    model = MODELS[kind]().eval()
    with pytest.warns(UserWarning, match=WARNING):
        report = quantize_model(
            model, "int8_row_a8", observer=observer, calibration=BATCHES, progress=False
        )
    for row in report.layers:
        layer = model.get_submodule(row.name)
        assert (layer.input_scale is None) == (row.name == SILENT)
        assert (row.note is None) == (row.name != SILENT)
    assert report.layers[2].note.endswith(
        "in calibration: its activations have a scale per row of x"
    )


@pytest.mark.parametrize("kind", MODELS)
def test_llm_int8(kind):
    model = MODELS[kind]().eval()
    with pytest.warns(UserWarning, match=WARNING):
        report = quantize_llm_int8(model, calibration=BATCHES, progress=False)
    for row in report.layers:
        assert (model.get_submodule(row.name).features is None) == (row.name == SILENT)
    assert report.layers[2].note.endswith("its outlier features are found in every call")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", ["kl", "output"])
@pytest.mark.parametrize("method", [None, "gptq"])
@pytest.mark.filterwarnings("ignore:no gradient has reached")
@pytest.mark.filterwarnings("ignore:calibration says nothing of experts.2. their errors count 0")
def test_allocate(kind, objective, method):
    """Its error counts nothing, so it gets the smallest candidate."""
    model = MODELS[kind]().eval()
    found = allocate(
        model, ["int8_g32", "int2_g32"], 5, method=method, calibration=BATCHES,
        objective=objective, progress=False,
    )  # fmt: skip
    (choice,) = (c for c in found.choices if c.names == (SILENT,))
    assert [o.error for o in choice.options] == [0, 0]
    assert choice.option.rule.format.name == "int2_g32"
    # The dead layer's own output is 0 as well, so that its error counts nothing for the logits.
    assert sum(sum(o.error for o in c.options) > 0 for c in found.choices) >= 2


def test_what_no_gradient_reaches_counts_nothing():
    model = Moe(called=False)
    names = ["experts.0", SILENT]
    with pytest.warns(UserWarning, match=f"no gradient has reached {SILENT}: 0 is assumed"):
        found = output_fisher(model, names, BATCHES)
    assert not found[SILENT].inputs.any()
    assert found[SILENT].inputs.shape == (32, 32)
    assert found["experts.0"].inputs.any()
    with pytest.warns(UserWarning, match=rf"not depend on the weights of {SILENT}: 0 is assumed"):
        diagonal = fisher_diagonal(model, BATCHES, names, loss=lambda y, _: y.square().sum())
    assert not diagonal[SILENT].any()
    report = quantize_model(
        model, {"experts": "kmeans2"}, method="kmeans", sensitivities=diagonal, progress=False
    )
    assert len(report.layers) == 3


@pytest.mark.parametrize("batches", [[torch.zeros(0, 32)], [torch.zeros(4, 32)]])
@pytest.mark.parametrize(
    "how", [{"method": "gptq", "format": "int4"}, {"observer": "kl", "format": "int8_row_a8"}]
)
def test_calibration_that_says_nothing_at_all(batches, how):
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="^calibration is empty or 0, for every layer: 0: "):
        quantize_model(model, calibration=batches, progress=False, **how)
    with pytest.raises(ValueError, match="^calibration is empty or 0, for every layer: 0: "):
        quantize_llm_int8(model, calibration=batches, progress=False)
    with pytest.raises(ValueError, match="^calibration is empty or 0"):
        allocate(
            model, ["int4", "int8"], 6, calibration=batches, objective="output", progress=False
        )
    assert type(model[0]) is nn.Linear


POWERS = [-140, -83, -45, -39, 0, 39, 65, 120]


@pytest.mark.parametrize("power", POWERS)
def test_sums_of_inputs_of_any_size(power: int):
    """A power of two changes no digit: of subnormal inputs as many as they have."""
    x = torch.randn(64, 12, dtype=torch.float64)
    scaled = (x * 2.0**power).float()
    exact = scaled.double() * 2.0**-power
    statistics = InputStatistics(12)
    for part in scaled.split([1, 13, 50]):
        statistics.update(part)
    h = exact.T @ exact / 64
    relative = statistics.relative_hessian.double()
    relative *= h.diagonal().mean() / relative.diagonal().mean()
    torch.testing.assert_close(relative, h, rtol=1e-5, atol=1e-5)
    diagonal = statistics.relative_diagonal.double()
    diagonal *= h.diagonal().mean() / diagonal.mean()
    torch.testing.assert_close(diagonal, h.diagonal(), rtol=1e-6, atol=0)
    for name in ("hessian", "diagonal"):
        if power in (-39, 0, 39):
            got = getattr(statistics, name).double() * 2.0 ** (-2 * power)
            wanted = h if name == "hessian" else h.diagonal()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        elif power != -45:
            with pytest.raises(ValueError, match=r"squares of inputs up to .* do not fit fp32"):
                getattr(statistics, name)


@pytest.mark.parametrize("first", POWERS)
@pytest.mark.parametrize("second", POWERS)
def test_sizes_that_change_from_batch_to_batch(first: int, second: int):
    x = torch.randn(2, 64, 12, dtype=torch.float64)
    parts = [(x[0] * 2.0**first).float(), (x[1] * 2.0**second).float()]
    statistics = InputStatistics(12)
    for part in parts:
        statistics.update(part)
    top = 2.0 ** -max(first, second)
    rows = torch.cat([part.double() * top for part in parts])
    h = rows.T @ rows
    relative = statistics.relative_hessian.double()
    relative *= h.diagonal().mean() / relative.diagonal().mean()
    torch.testing.assert_close(relative, h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [-83, -41, 41, 64])
@pytest.mark.parametrize(("method", "format"), [("gptq", "int3_g32"), ("kmeans", "kmeans2")])
def test_weights_do_not_depend_on_the_size_of_inputs(power: int, method: str, format: str):
    """1e-25 and 1e19: squares that are no fp32 numbers."""
    made = []
    dense = nn.Linear(64, 16, bias=False).weight.detach()
    x = torch.randn(200, 64)
    assert not math.isinf(float(x.abs().max()) * 2.0**power)
    for factor in (1.0, 2.0**power):
        model = nn.Sequential(nn.Linear(64, 16, bias=False))
        model[0].weight.data.copy_(dense)
        report = quantize_model(
            model, format, method=method, calibration=[x * factor], progress=False
        )
        assert report.layers[0].note is None
        made.append(model[0].quant_tensor().dequantize())
    assert torch.equal(*made)
