"""quantize_model: what is replaced and what is left, sharing, memory, and the report's numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit import nn as qnn
from lowbit.formats import FORMATS
from lowbit.methods import quantize
from lowbit.nn.names import Selection
from lowbit.ptq import model as model_module
from lowbit.ptq import quantize_model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """A language model in small: embedding, blocks, a head that is tied to the embedding."""

    def __init__(self, blocks: int = 2, width: int = 48, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width, padding_idx=3)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(30).view(2, 15)


def dense_twin(model: Model) -> Model:
    """A dense model with the dequantized weights."""
    twin = Model()
    for name, module in model.named_modules():
        if isinstance(module, qnn.PackedModule):
            twin.get_submodule(name).weight.data = module.quant_tensor().dequantize()
            if getattr(module, "bias", None) is not None:
                twin.get_submodule(name).bias.data = module.bias.data
    rest = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    twin.load_state_dict(rest, strict=False)
    return twin


def test_linears_are_replaced_in_place():
    model = Model().eval()
    dense = {
        name: m.weight.detach().clone()
        for name, m in model.layers.named_modules()
        if isinstance(m, nn.Linear)
    }
    bias = model.layers[0].up.bias
    report = quantize_model(model, "int4_g32", progress=False)
    names = [f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")]
    assert [row.name for row in report.layers] == names
    assert report.left == {
        "embed": "an embedding is quantized only if a recipe names it",
        "lm_head": "skipped",
    }
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, qnn.QuantLinear)
        assert not layer.training
        wanted = quantize(dense[name.removeprefix("layers.")], "int4_g32")
        assert torch.equal(layer.quant_tensor().dequantize(), wanted.dequantize())
    assert model.layers[0].up.bias.data_ptr() == bias.data_ptr()
    assert model.lm_head.weight is model.embed.weight
    got, expected = model(TOKENS), dense_twin(model).eval()(TOKENS)
    # fp32 sums of at most 96 products, in another order.
    assert (got - expected).abs().max() <= 96 * 2**-23 * expected.abs().max() * 4


def test_report():
    model = Model(blocks=1, tied=False)
    weights = {
        "layers.0.up": model.layers[0].up.weight,
        "layers.0.down": model.layers[0].down.weight,
    }
    weights = {name: w.detach().clone() for name, w in weights.items()}
    report = quantize_model(model, {"up": "nf4", "down": "kmeans3"}, progress=False)
    for row in report.layers:
        qt = model.get_submodule(row.name).quant_tensor()
        error = qt.dequantize().double() - weights[row.name].double()
        assert math.isclose(
            row.relative_error, error.norm() / weights[row.name].double().norm(), rel_tol=1e-9
        )
        assert row.max_error == error.abs().max()
        assert row.nbytes == qt.nbytes
        assert row.dense_nbytes == weights[row.name].numel() * 4
        assert row.shape == tuple(weights[row.name].shape)
        assert row.format == {"up": "nf4", "down": "kmeans3"}[row.name.rpartition(".")[2]]
    assert report.nbytes == sum(row.nbytes for row in report.layers)
    assert report.dense_nbytes == 2 * 48 * 96 * 4
    assert report.bits_per_weight == 8 * report.nbytes / (2 * 48 * 96)
    text = str(report)
    lines = text.splitlines()
    assert lines[1].split()[:3] == ["layers.0.up", "nf4", "96x48"]
    assert lines[3].startswith(f"2 layers, {report.bits_per_weight:.3f} bits/weight")
    assert "left dense: lm_head (skipped)" in lines
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["format"] == "kmeans3"


def test_recipe_with_tied_embedding():
    model = Model()
    recipe = {r"embed|lm_head": "int8_g32", r"layers.0.*": FORMATS["nf4"], "layers": None}
    report = quantize_model(model, recipe, skip=(), progress=False)
    rows = {row.name: row for row in report.layers}
    assert set(rows) == {"embed", "lm_head", "layers.0.up", "layers.0.down"}
    assert rows["lm_head"].tied_to == "embed"
    assert report.left == {"layers.1.up": "not in the recipe", "layers.1.down": "not in the recipe"}
    assert isinstance(model.embed, qnn.QuantEmbedding)
    assert (model.embed.padding_idx, model.embed.dtype) == (3, torch.float32)
    assert model.lm_head.codes is model.embed.codes
    counted = [rows[name].nbytes for name in ("embed", "layers.0.up", "layers.0.down")]
    assert report.nbytes == sum(counted)
    got, expected = model(TOKENS), dense_twin(model)(TOKENS)
    assert (got - expected).abs().max() <= 96 * 2**-23 * expected.abs().max() * 4


def test_a_tied_weight_with_two_formats_is_quantized_twice():
    model = Model(blocks=0)
    quantize_model(model, {"embed": "int8", "lm_head": "int4"}, skip=(), progress=False)
    assert (model.embed.format.name, model.lm_head.format.name) == ("int8", "int4")


def test_shared_modules_stay_shared():
    model = nn.Module()
    model.first = Block(20)
    model.again = model.first
    model.list = nn.ModuleList([model.first.up, nn.Linear(20, 40), nn.Embedding(7, 20)])
    model.list[1].weight = model.first.up.weight
    model.second = nn.Embedding(7, 20)
    model.second.weight = model.list[2].weight
    report = quantize_model(model, {".*": "int4"}, progress=False)
    assert isinstance(model.first.up, qnn.QuantLinear)
    assert model.again.up is model.first.up is model.list[0]
    assert model.list[1] is not model.first.up
    assert model.list[1].codes is model.first.up.codes
    assert model.second.codes is model.list[2].codes
    assert {row.name: row.tied_to for row in report.layers} == {
        "first.up": None,
        "first.down": None,
        "list.1": "first.up",
        "list.2": None,
        "second": "list.2",
    }


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class OwnConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_cannot_be_replaced_is_left():
    model = nn.ModuleDict(
        {
            "conv": OwnConv(3, 4, 3),
            "own": Doubled(4, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "renormed": nn.Embedding(5, 4, max_norm=1.0),
            "done": qnn.QuantLinear(4, 4, format="int8"),
            "norm": nn.LayerNorm(4),
        }
    )
    before = dict(model.named_modules())
    with pytest.warns(UserWarning, match="of the weights stay dense and cannot be quantized"):
        report = quantize_model(model, {".*": "int4"}, progress=False)
    assert not report.layers
    assert report.left == {
        "conv": "OwnConv has a forward of its own",
        "own": "Doubled has a forward of its own",
        "attention": "MultiheadAttention has no quantized form: in_proj_weight",
        "attention.out_proj": "the parent of this NonDynamicallyQuantizableLinear reads its weight directly",
        "encoder.self_attn": "MultiheadAttention has no quantized form: in_proj_weight",
        "encoder.self_attn.out_proj": "the parent of this NonDynamicallyQuantizableLinear reads its weight directly",
        "encoder.linear1": "the parent of this Linear reads its weight directly",
        "encoder.linear2": "the parent of this Linear reads its weight directly",
        "renormed": "max_norm changes the weight in forward",
        "done": "already quantized to int8",
    }
    assert dict(model.named_modules()) == before


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """When a layer is quantized, the dense weight of every layer before it is gone, if errors may
    leave a half-quantized model.
    """
    model = Model(blocks=3, tied=False)
    references = [weakref.ref(m.weight) for m in model.layers.modules() if isinstance(m, nn.Linear)]
    alive = []

    def counting(*args, **kwargs):
        alive.append(sum(r() is not None for r in references))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(model_module, "quantize", counting)
    quantize_model(model, "int4", progress=False, atomic=False)
    assert alive == [6, 5, 4, 3, 2, 1]


PEAK = """
import re, sys, torch
from lowbit.ptq import quantize_model

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

torch.set_num_threads(1)
make = torch.nn.utils.skip_init
shape = (torch.nn.Linear, 4096, 8192)
linears = [make(*shape, bias=False, dtype=torch.bfloat16) for _ in range(2)]
for linear in linears:
    linear.weight.data.normal_()
model = torch.nn.Sequential(torch.nn.Linear(64, 64), *linears)
del linears
quantize_model(model[:1], "nf4", progress=False)
before = peak()
report = quantize_model(model, "nf4", progress=False, atomic=sys.argv[1] == "True")
print(peak() - before - (report.nbytes if sys.argv[1] == "True" else 0))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("atomic", [False, True])
def test_memory_peaks_near_one_layer_above_the_dense_model(atomic: bool):
    """The start holds every dense layer; quantizing adds at most the size of one at any time, and
    the result if the dense layers are kept to be put back.
    """
    command = [sys.executable, "-c", PEAK, str(atomic)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 4096 * 8192 * 2


def test_errors_name_the_layer():
    model = Model(blocks=2)
    with torch.no_grad():
        model.layers[1].up.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"^layers\.1\.up: weight\[2, 3\] = nan is not finite"):
        quantize_model(model, "int4", progress=False)
    assert not any(isinstance(module, qnn.PackedModule) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
        ({"format": "int7"}, ValueError, "unknown format 'int7'"),
        ({"format": {"up": "int7"}}, ValueError, "unknown format 'int7'"),
        ({"format": {"(": "int4"}}, ValueError, r"pattern '\(' is not a regular expression"),
        ({"format": {4: "int4"}}, TypeError, "a pattern must be a string, got 4"),
        ({"skip": "lm_head"}, TypeError, "skip must be a sequence of patterns, got the string"),
        ({"method": "best"}, ValueError, "method must be one of .* got 'best'"),
        ({"method": "kmeans"}, ValueError, "method 'kmeans' fits tables"),
        ({"model": nn.Linear(3, 3)}, ValueError, r"it is one itself \(Linear\)"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        quantize_model(**{"model": model, "format": "int4", "progress": False, **arguments})
    assert isinstance(model.layers[0].up, nn.Linear)


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("lm_head", ["lm_head", "model.lm_head", "lm_head.inner"], ["lm_head2", "my_lm_head"]),
        ("layers.1", ["model.layers.1.up", "layers.1"], ["layers.10.up", "layers.2.1"]),
        (r"layers\.\d\.up", ["a.layers.3.up"], ["layers.12.up", "layers.3.upper"]),
        ("up|down", ["layers.0.up", "down"], ["layers.0.gate", "updown"]),
        (".*mlp.*", ["layers.0.mlp.up", "x.mlp2"], ["layers.0.up"]),
        (".*", ["a", "a.b"], []),
    ],
)
def test_patterns_match_whole_components(pattern, matches, others):
    selection = Selection({pattern: "int4"})
    assert all(selection.format(name) == FORMATS["int4"] for name in matches)
    assert all(selection.format(name) is None for name in others)
    skipping = Selection("int4", [pattern])
    assert all(skipping.skipped(name) and skipping.format(name) is None for name in matches)
    assert all(skipping.format(name) == FORMATS["int4"] for name in others)


def test_the_first_pattern_counts():
    selection = Selection({"a.b": "int4", "c": None, "a|c": "int8"})
    assert [selection.format(n) for n in ("a.b", "a.c", "a")] == [
        FORMATS["int4"],
        None,
        FORMATS["int8"],
    ]


@pytest.mark.parametrize("missing", [(), ("rich",), ("rich", "tqdm")], ids=["rich", "tqdm", "none"])
def test_progress(missing, monkeypatch: pytest.MonkeyPatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    report = quantize_model(Model(), "int4", progress=True)
    assert len(report.layers) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    if len(missing) == 1:
        assert "quantizing" in captured.err
