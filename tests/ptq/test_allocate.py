"""Bit allocation: the knapsack against brute force, errors against fp64, budgets, and toys on which it must pay."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from lowbit.methods import quantize
from lowbit.nn.names import Rule
from lowbit.ptq import InputStatistics, allocate, calibration, knapsack, quantize_model

ITEM = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 100)), min_size=1, max_size=4)


def brute_force(sizes, errors, capacity: int) -> float:
    """The least error of all combinations that fit."""
    return min(
        sum(e[j] for e, j in zip(errors, choice, strict=True))
        for choice in itertools.product(*(range(len(s)) for s in sizes))
        if sum(s[j] for s, j in zip(sizes, choice, strict=True)) <= capacity
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 60))
def test_knapsack_is_optimal(items, spare):
    sizes, errors = [[s for s, _ in i] for i in items], [[e for _, e in i] for i in items]
    capacity = knapsack.smallest(sizes) + spare
    found = knapsack.solve(sizes, errors, capacity)
    assert found.resolution == 1
    size = sum(s[j] for s, j in zip(sizes, found.choices, strict=True))
    error = sum(e[j] for e, j in zip(errors, found.choices, strict=True))
    assert size <= capacity
    # Sums of at most 5 numbers in another order.
    assert error <= brute_force(sizes, errors, capacity) * (1 + 5 * 2**-52)
    for size, error in found.frontier:
        best = brute_force(sizes, errors, size)
        assert math.isclose(error, best, rel_tol=5 * 2**-52)
    fits = [point for point in found.frontier if point[0] <= capacity]
    assert fits[-1][0] == sum(s[j] for s, j in zip(sizes, found.choices, strict=True))


def test_knapsack_against_scipy():
    """60 items of 5 options, which no brute force can walk through."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 500, (60, 5)) * 64
    errors = rng.exponential(size=(60, 5)) * np.exp(-sizes / 8000)
    capacity = int(sizes.min(1).sum() + 0.3 * (sizes.max(1) - sizes.min(1)).sum())
    found = knapsack.solve(sizes.tolist(), errors.tolist(), capacity)
    once = np.kron(np.eye(60), np.ones(5))
    oracle = milp(
        errors.ravel(),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(sizes.ravel(), ub=capacity)],
        integrality=np.ones(300),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    chosen = errors[np.arange(60), found.choices]
    # HiGHS stops within 1e-6 of the optimum.
    assert found.resolution == 1
    assert abs(chosen.sum() - oracle.fun) <= 1e-6
    assert sizes[np.arange(60), found.choices].sum() <= capacity


def test_knapsack_at_a_coarser_resolution_keeps_the_budget():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 10**9, (20, 4)).tolist()
    errors = rng.random((20, 4)).tolist()
    least, most = knapsack.smallest(sizes), sum(map(max, sizes))
    for capacity in (least, (least + most) // 2, most):
        found = knapsack.solve(sizes, errors, capacity, max_states=1 << 12)
        assert 1 < found.resolution <= most // (1 << 12) + 1
        assert sum(s[j] for s, j in zip(sizes, found.choices, strict=True)) <= capacity
    # With all the room in the world every item has its best option.
    assert found.choices == tuple(int(np.argmin(e)) for e in errors)


def test_knapsack_ties_and_bad_input():
    # Equal errors: the smaller size; equal sizes too: the earlier option.
    assert knapsack.solve([[4, 2, 2]], [[1.0, 1.0, 1.0]], 9).choices == (1,)
    assert knapsack.solve([[7]], [[0.0]], 7).frontier == ((7, 0.0),)
    with pytest.raises(
        ValueError, match="capacity must be at least 7, the smallest possible, got 6"
    ):
        knapsack.solve([[7]], [[0.0]], 6)
    for errors in ([], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="options with finite errors"):
            knapsack.solve([[7] * len(errors)], [errors], 7)


class Net(nn.Module):
    """Layers of very different scales, and inputs of very different features."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=i % 2 == 0) for i in range(4))
        self.lm_head = nn.Linear(width, 40, bias=False)
        with torch.no_grad():
            self.embed.weight *= torch.linspace(0.05, 3, width)
            for i, layer in enumerate(self.layers):
                layer.weight *= 3.0 ** (i - 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(x)


BATCHES = [torch.arange(40).view(2, 20), torch.arange(39, -1, -1).view(1, 40)]
CANDIDATES = ["int2_g32", "int3_g32", "int4_g32"]
NAMES = [f"layers.{i}" for i in range(4)]
COUNTS = {name: torch.linspace(0.1, 2, 64) for name in NAMES}


def test_choices_are_made_as_predicted_and_beat_uniform_bits():
    model = Net()
    found = allocate(model, CANDIDATES, 3.5, progress=False)
    assert found.resolution == 1
    assert [c.names for c in found.choices] == [(name,) for name in NAMES]
    assert found.left["lm_head"] == "skipped"
    dense = {name: model.get_submodule(name).weight.detach().double() for name in NAMES}
    report = quantize_model(model, found.recipe, progress=False)
    assert [row.format for row in report.layers] == [
        c.option.rule.format.name for c in found.choices
    ]
    assert report.nbytes == found.nbytes
    assert report.bits_per_weight == found.bits_per_weight <= 3.5
    for row, c in zip(report.layers, found.choices, strict=True):
        error = model.get_submodule(row.name).quant_tensor().dequantize().double() - dense[row.name]
        assert math.isclose(float(error.square().sum()), c.option.error, rel_tol=1e-12)
    # int3_g32 takes 3.5 bits everywhere; the layers with the large weights need more.
    bits, error = found.uniform["int3_g32"]
    assert bits == 3.5
    assert found.error < 0.5 * error
    formats = {c.names[0]: c.option.rule.format.name for c in found.choices}
    assert formats["layers.0"] == "int2_g32"
    assert formats["layers.3"] == "int4_g32"


def test_budgets():
    model = Net()
    uniform = allocate(model, ["int3_g32"], 16, progress=False)
    # The size of a report admits what was reported, whatever its last digit.
    again = allocate(model, CANDIDATES, uniform.bits_per_weight, progress=False)
    assert again.error <= uniform.error
    in_bytes = allocate(model, CANDIDATES, budget_bytes=uniform.nbytes, progress=False)
    assert in_bytes == again
    everything = allocate(model, CANDIDATES, 100, progress=False)
    assert {c.chosen for c in everything.choices} == {2}
    assert everything.at(uniform.bits_per_weight) == again
    assert again.at(budget_bytes=everything.nbytes) == everything.at(100)
    least = 4 * 64 * 64 * 2.5 / 8
    assert allocate(model, CANDIDATES, 2.5, progress=False).nbytes == least
    message = (
        r"budget of 2\.4 bits per weight \(4915 bytes\) cannot be met: the smallest possible is "
        r"2\.5000 bits per weight \(5120 bytes\)"
    )
    with pytest.raises(ValueError, match=message):
        allocate(model, CANDIDATES, 2.4, progress=False)
    with pytest.raises(ValueError, match=message):
        again.at(2.4)
    with pytest.raises(ValueError, match="give budget or budget_bytes, one of the two, got None"):
        again.at()
    errors = [
        allocate(model, CANDIDATES, b, progress=False).error for b in (2.5, 2.75, 3, 3.5, 4, 4.5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert [e for b, e in again.frontier if b <= 3.5][-1] == pytest.approx(again.error, rel=1e-14)


def inputs_of(model: Net, name: str) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, a: rows.append(a[0].detach().flatten(0, -2)))
    for batch in BATCHES:
        model(batch)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_calibration_gives_the_error_of_outputs(one_by_one, monkeypatch):
    if one_by_one:
        monkeypatch.setattr(calibration, "_HESSIAN_BYTES", 1)
    model = Net().eval()
    found = allocate(
        model, CANDIDATES, 3.2, calibration=iter(BATCHES), objective="output", progress=False
    )
    for c in found.choices:
        x = inputs_of(model, c.names[0]).double()
        w = model.get_submodule(c.names[0]).weight.detach()
        for option in c.options:
            e = quantize(w, option.rule.format).dequantize().double() - w.double()
            exact = float((e @ x.T).square().sum() / len(x))
            # The Hessian is a sum of 80 products in fp32.
            assert math.isclose(option.error, exact, rel_tol=1e-4)


def test_gptq_candidates_and_sensitivities():
    """Hessians that are given do what calibration does, and reach the methods."""
    model = Net().eval()
    rules = [Rule("int2_g32", "gptq"), Rule("int3_g32", "gptq", {"act_order": True}), "int4_g32"]
    by_calibration = allocate(
        model, rules, 3.2, calibration=BATCHES, objective="output", progress=False
    )
    hessians = {}
    for name in NAMES:
        statistics = InputStatistics(64)
        for part in inputs_of(model, name).split(40):
            statistics.update(part)
        hessians[name] = statistics.hessian
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    given = allocate(weights, rules, 3.2, sensitivities=hessians, progress=False)
    assert given.choices == by_calibration.choices
    plain = allocate(weights, [r if isinstance(r, str) else r.format for r in rules], 3.2,
                     sensitivities=hessians, progress=False)  # fmt: skip
    for c, d in zip(given.choices, plain.choices, strict=True):
        assert c.options[0].error < d.options[0].error
        assert c.options[2].error == d.options[2].error
    assert given.choices[0].options[1].rule.options == {"act_order": True}

    diagonal = {name: h.diagonal() for name, h in hessians.items()}
    found = allocate(
        weights, ["kmeans2", "kmeans3"], 3, method="kmeans", sensitivities=diagonal, progress=False
    )
    for c in found.choices:
        w, d = weights[c.names[0]].detach(), diagonal[c.names[0]]
        qt = quantize(w, "kmeans2", weights=d)
        exact = float(((qt.dequantize() - w).double().square() * d.double()).sum())
        assert math.isclose(c.options[0].error, exact, rel_tol=1e-12)
    with pytest.raises(ValueError, match=r"layers\.0: the method needs a .* \(K, K\), got \(64,\)"):
        allocate(weights, rules, 3.2, sensitivities=diagonal, progress=False)


def test_a_factor_moves_bits():
    weights = {"a": torch.randn(32, 64), "b": torch.randn(32, 64)}
    for favoured, other in (("a", "b"), ("b", "a")):
        factors = {favoured: 10.0, other: 1}
        found = allocate(weights, CANDIDATES, 3.5, sensitivities=factors, progress=False)
        formats = {c.names[0]: c.option.rule.format.name for c in found.choices}
        assert formats[favoured] == "int4_g32"
        assert formats[other] == "int2_g32"
    nothing = allocate(weights, CANDIDATES, 4, sensitivities={"a": 0.0, "b": 0.0}, progress=False)
    assert nothing.bits_per_weight == 2.5
    assert nothing.error == 0
    assert "0.0%" in str(nothing)


def test_shared_weights_count_once():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    found = allocate(model, CANDIDATES, 3.5, sensitivities={"0": 1, "1": 1, "2": 3}, progress=False)
    assert [c.names for c in found.choices] == [("0", "2"), ("1",)]
    assert found.weights == 2 * 32 * 32
    # The shared weight's error counts 1 + 3 times.
    w = model[0].weight.detach()
    e = quantize(w, "int2_g32").dequantize() - w
    assert math.isclose(found.choices[0].options[0].error, 4 * float(e.double().square().sum()))
    report = quantize_model(model, found.recipe, progress=False)
    assert report.nbytes == found.nbytes
    assert {row.name: row.tied_to for row in report.layers} == {"0": None, "1": None, "2": "0"}
    weight = torch.randn(8, 32)
    names = allocate({"x": weight, "y": weight, "z": weight.clone()}, CANDIDATES, 3, progress=False)
    assert [c.names for c in names.choices] == [("x", "y"), ("z",)]


class Made(dict):
    """Gives a new tensor each time, at the address of the last one perhaps."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.full((8, 32), float(super().__getitem__(name)))


def test_a_mapping_may_read_each_weight_anew():
    found = allocate(Made(a=1, b=2, c=3), CANDIDATES, 3, progress=False)
    assert [c.names for c in found.choices] == [("a",), ("b",), ("c",)]


def test_table_and_json():
    found = allocate(Net(), CANDIDATES, 3.2, progress=False)
    lines = str(found).splitlines()
    assert lines[1].split()[:3] == ["layers.0", "int2_g32", "64x64"]
    assert lines[5].startswith("4 layers")
    assert lines[5].split()[2] == f"{found.bits_per_weight:.3f}"
    assert [line.split()[:2] for line in lines[6:]] == [["all", name] for name in CANDIDATES]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["error"] == found.error
    assert [layer["chosen"] for layer in data["layers"]] == [
        c.option.rule.format.name for c in found.choices
    ]
    assert data["uniform"]["int4_g32"][0] == 4.5


BAD = [
    ({"candidates": []}, ValueError, "candidates must hold at least one format"),
    ({"candidates": [None]}, ValueError, "and no None"),
    ({"candidates": ["int7"]}, ValueError, "unknown format 'int7'"),
    ({"budget": None}, ValueError, "give budget or budget_bytes, one of the two, got None and None"),
    ({"budget_bytes": 9000}, ValueError, "one of the two, got 3 and 9000"),
    ({"budget": "3"}, TypeError, "a budget must be a number, got '3'"),
    ({"budget": True}, TypeError, "a budget must be a number, got True"),
    ({"budget": math.nan}, ValueError, "a budget must be positive and finite, got nan"),
    ({"budget": 0}, ValueError, "a budget must be positive and finite, got 0"),
    ({"weights": 3}, TypeError, "weights must be a model or a mapping, got int"),
    ({"weights": {}}, ValueError, "weights must hold at least one linear"),
    ({"weights": {"a": torch.zeros(3)}}, ValueError, r"a: weight must be .* got \(3,\)"),
    ({"skip": ("lm_head", "layers")}, ValueError, "at least one linear that is not skipped"),
    ({"method": "gptq"}, ValueError, "method 'gptq' needs calibration"),
    ({"method": "best"}, ValueError, "method must be one of .* got 'best'"),
    ({"method": "gptq", "options": {"order": 1}}, ValueError, "method 'gptq' takes no order"),
    ({"objective": "loss"}, ValueError, r"objective must be one of \('kl', 'output', 'measured'\), got 'loss'"),
    ({"calibration": []}, ValueError, "calibration is empty"),
    ({"calibration": BATCHES, "sensitivities": {}}, ValueError, "calibration or sensitivities, not"),
    ({"sensitivities": {}}, ValueError, r"sensitivities has nothing for layers\.0"),
    ({"sensitivities": {}, "importance": {}}, ValueError, "give importance or sensitivities, not both"),
    ({"weights": {"a": torch.zeros(2, 3)}, "importance": {}}, ValueError, "importance needs a model"),
    ({"importance": {}}, ValueError, "method 'rtn' takes no importance: use 'search' or 'kmeans'"),
    ({"importance": COUNTS, "method": "gptq", "calibration": BATCHES}, ValueError, "'gptq' takes no importance"),
    ({"importance": COUNTS, "method": "gptq"}, ValueError, "method 'gptq' needs calibration"),
    ({"importance": {}, "method": "search"}, ValueError, r"importance has no entry of 'layers\.0', which"),
    ({"importance": {"x": torch.ones(64)}, "method": "search"}, ValueError, "names 'x', which is no nn.Linear"),
    ({"importance": COUNTS | {"lm_head": torch.ones(3)}, "method": "search"}, ValueError, r"\(64,\), .* got \(3,\)"),
    ({"importance": dict.fromkeys(NAMES, torch.zeros(64)), "method": "search"}, ValueError, "all 64 values are 0"),
    ({"importance": dict.fromkeys(NAMES, torch.full((64,), math.inf)), "method": "search"}, ValueError, "is inf"),
    ({"sensitivities": dict.fromkeys(NAMES, -1)}, ValueError, "finite and not negative"),
    ({"sensitivities": dict.fromkeys(NAMES, torch.full((64,), math.nan))}, ValueError, "finite"),
    ({"sensitivities": dict.fromkeys(NAMES, torch.ones(3))}, ValueError, r"got torch.float32 .* \(3,\)"),
    ({"sensitivities": dict.fromkeys(NAMES, "x")}, TypeError, "must be a number or a tensor, got 'x'"),
    ({"sensitivities": dict.fromkeys([*NAMES, "x"], 1)}, ValueError, r"no layers: \['x'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(arguments, error, message):
    given = {"weights": Net(), "candidates": CANDIDATES, "budget": 3, "progress": False}
    with pytest.raises(error, match=message):
        allocate(**{**given, **arguments})


def test_errors_name_the_layer():
    model = Net()
    with torch.no_grad():
        model.layers[2].weight[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"layers\.2: weight\[1, 2\] = inf is not finite"):
        allocate(model, CANDIDATES, 3, progress=False)
    given = {"a": torch.randn(8, 32)}
    with pytest.raises(ValueError, match="calibration needs a model"):
        allocate(given, CANDIDATES, 3, calibration=BATCHES, progress=False)
