"""Recipes: files that give back what was written, errors that name file, line and pattern, methods per layer."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit.formats import FORMATS, Format
from lowbit.methods import quantize
from lowbit.nn.names import Rule, Selection, compile_pattern
from lowbit.ptq import Recipe, quantize_model

MINE = Format.lut(bits=2, table=[-1, -0.25, 0.5, 1], group=32)
RECIPE = Recipe(
    {
        r"layers\.0": "int8",
        "self_attn|mlp": Rule("kmeans3_g64", "gptq", {"act_order": True, "damping": 1e-05}),
        "'quoted'|\"both\"": Rule("uint4_zfloat", "hqq", {"iterations": 3}),
        "mine": MINE,
        "lm_head": None,
        ".*": Rule("int4_g32", options={"table": "é\x7f\n"}),
    }
)


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_round_trip(name, tmp_path):
    RECIPE.save(tmp_path / name)
    loaded = Recipe.load(tmp_path / name)
    assert loaded == RECIPE
    assert loaded["mine"].format == MINE
    assert loaded["lm_head"].format is None
    assert type(loaded["self_attn|mlp"].options["act_order"]) is bool
    if name == "recipe.toml":
        assert "\n'layers\\.0' = \"int8\"\n" in (tmp_path / name).read_text()


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(name, at, tmp_path, monkeypatch):
    """As on a full disk: neither a part of the new rules nor a temporary file is there."""
    path = tmp_path / name
    RECIPE.save(path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if at == "write":
        large = Recipe({f"layer{i}": "int4" for i in range(9000)})
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                large.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)
    else:
        monkeypatch.setattr(os, at, full)
        with pytest.raises(OSError, match="No space left"):
            Recipe({"a": "int4"}).save(path)
    assert Recipe.load(path) == RECIPE
    assert [file.name for file in tmp_path.iterdir()] == [name]


SLOW = [
    "(a+)+b", "(a*)*b", "((a+))+b", "(a|a)*b", "(a|aa)+b", "(?:a?){20}b", "(a{1,9}){1,9}b", "(.*)*b", "(a+){2}b",
    "(?=(a+)+b)a", "x|(a+)+b", "(a+)*?b", "a?" * 30 + "b", "(a|aa)" * 30, ".*" * 8 + "b", "(?P<n>a+)+b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW, ids=lambda p: p[:20])
def test_patterns_that_could_take_very_long_are_refused(pattern):
    with pytest.raises(
        ValueError, match=f"^pattern '{re.escape(pattern[:60])}.*could take very long"
    ):
        Recipe({pattern: "int4"})
    with pytest.raises(ValueError, match="could take very long"):
        Selection("int4", [pattern])


ALLOWED = [
    ".*", r"layers\.\d+\.mlp", "(q|k|v|o)_proj", ".*layers.*(self_attn|mlp).*proj.*", "(model\\.)?layers", "[ab]*c",
    r"layers\.([0-9]|1[0-9]|2[0-7])\.(mlp\.(gate|up|down)_proj|self_attn\.[qkvo]_proj)", r"(?:layers\.\d+\.)?mlp",
    "a{3,}", "(ab)+c", "(?!lm_head).*", "|".join(f"^layers.{i}.up$" for i in range(2000)), r"(.*)\.\1",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ALLOWED, ids=lambda p: p[:20])
def test_the_others_are_fast(pattern):
    """Whatever the name: here those that match at the last place, or nowhere."""
    compiled = compile_pattern(pattern)
    start = time.process_time()
    for name in (
        "a" * 64,
        "ab" * 32,
        "layers." * 12 + "proj",
        "model.layers.10.self_attn.k_proj.x",
    ):
        compiled.search(name)
    assert time.process_time() - start < 0.5


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(st.dictionaries(st.text(max_size=8).map(re.escape), st.sampled_from(["nf4", "int2", None])))
def test_any_pattern_survives(tmp_path, rules):
    for name in ("a.toml", "a.json"):
        try:
            Recipe(rules).save(tmp_path / name)
        except UnicodeEncodeError:  # lone surrogates are no text
            continue
        assert Recipe.load(tmp_path / name) == Recipe(rules)


def test_a_file_as_a_person_writes_it(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        "version = 1  # of this layout\n\n[rules]\n'layers\\.1' = \"dense\"\n"
        'layers = "nf4"\n"up" = { format = "kmeans3", method = "kmeans" }\n'
        '[rules.down]\nformat = "int4"\nmethod = "gptq"\noptions.block = 32\n'
    )
    recipe = Recipe.load(path)
    assert list(recipe) == [r"layers\.1", "layers", "up", "down"]
    assert recipe["down"] == Rule(FORMATS["int4"], "gptq", {"block": 32})
    selection = Selection(recipe)
    assert selection.format("layers.1.up") is None
    assert selection.format("layers.2.up") == FORMATS["nf4"]


BAD_FILES = [
    ("r.toml", 'version = 1\n[rules]\nup = "nf4\n', r"r\.toml: .*line 3"),
    ("r.toml", 'version = 1\n[rules]\nup = "nf4"\nup = "int4"\n', r"r\.toml: .*line 4"),
    ("r.json", '{"version": 1,\n"rules": {"up" "nf4"}}', r"r\.json: .*line 2"),
    ("r.json", '{"version": 1, "rules": {"up": "nf4", "up": "int4"}}', "'up' comes twice"),
    ("r.json", "[1]", r"must hold 'version' and 'rules', got \[1\]"),
    ("r.toml", "rules = 3", r"must hold 'version' and 'rules', got \['rules'\]"),
    ("r.toml", "version = 2\n[rules]", "version must be 1, got 2"),
    ("r.toml", "version = 1\nrules = 3", "'rules' must be patterns with values, got 3"),
    ("r.toml", "version = 1\n[rules]\nup = 4", "pattern 'up' must have a format, .* got 4"),
    ("r.toml", "version = 1\n[rules.up]\nmethod = 'rtn'", "pattern 'up' must have a format"),
    ("r.toml", "version = 1\n[rules]\nup = 'int7'", "pattern 'up': unknown format 'int7'"),
    ("r.toml", "version = 1\n[rules]\n'u(p' = 'int4'", r"pattern 'u\(p' is not a regular"),
    ("r.toml", "version = 1\n[rules.up]\nformat = 'nf4'\nbits = 3", r"unknown keys \['bits'\]"),
    ("r.toml", "version = 1\n[rules.up]\nformat = 'nf4'\nmethod = 3", "'up': method must be a str"),
    ("r.toml", "version = 1\n[rules.up]\nformat = 'nf4'\nmethod = 'x'", "'up': method must be one"),
    ("r.toml", "version = 1\n[rules.up]\nformat = 'dense'\nmethod = 'rtn'", "left dense take no"),
    (
        "r.toml",
        "version = 1\n[rules.up]\nformat = 'nf4'\nmethod = 'gptq'\noptions.order = 1",
        "pattern 'up': method 'gptq' takes no order",
    ),
    (
        "r.toml",
        "version = 1\n[rules.up]\nformat = 'nf4'\nmethod = 'gptq'\noptions.act_order = 'yes'",
        "pattern 'up': act_order of method 'gptq' must be bool, got 'yes'",
    ),
    ("r.yaml", "up: nf4", r"must end in \.toml or \.json, got '.*r\.yaml'"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "nothing.toml")
    for value in (float("inf"), torch.ones(2), None):
        recipe = Recipe({"up": Rule("kmeans2", options={"table": value})})
        with pytest.raises(ValueError, match="pattern 'up': option table must be a bool"):
            recipe.save(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"must end in \.toml or \.json"):
        RECIPE.save(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="pattern 'up': unknown format 'int7'"):
        Recipe({"up": "int7"})
    with pytest.raises(TypeError, match="a pattern must be a string, got 3"):
        Recipe({3: "int4"})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_every_layer_has_the_method_of_its_rule(tmp_path):
    """A rule's own method comes with its own options; other rules get those of the call."""
    model, x = Net(), torch.randn(96, 64) * torch.linspace(0.1, 4, 64)
    dense = {name: layer.weight.detach().clone() for name, layer in model.named_children()}
    inputs = {}
    with torch.no_grad():
        y = x
        for name, layer in model.named_children():
            inputs[name] = y.T @ y / len(y)
            y = layer(y)
    recipe = Recipe(
        {
            "a": Rule("int3_g32", "gptq", {"block": 16}),
            "b": Rule("uint3_zfloat_g32", "hqq", {"iterations": 4}),
            "c": Rule("kmeans2", "kmeans"),
            "d": Rule("int2_g32", options={"damping": 0.05}),
        }
    )
    quantize_model(
        model, recipe, method="gptq", options={"damping": 0.02, "act_order": True},
        calibration=[x], progress=False,
    )  # fmt: skip
    wanted = {
        "a": quantize(dense["a"], "int3_g32", "gptq", hessian=inputs["a"], block=16),
        "b": quantize(dense["b"], "uint3_zfloat_g32", "hqq", iterations=4),
        "c": quantize(dense["c"], "kmeans2", weights=inputs["c"].diagonal()),
        "d": quantize(
            dense["d"], "int2_g32", "gptq", hessian=inputs["d"], damping=0.05, act_order=True
        ),
    }
    for name in ("b", "a", "d"):
        got = model.get_submodule(name).quant_tensor()
        assert torch.equal(got.dequantize(), wanted[name].dequantize()), name
    # The diagonal of the Hessian is a sum in fp32, that of the statistics one in fp64.
    table = model.c.quant_tensor().table
    torch.testing.assert_close(table, wanted["c"].table, rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match="method 'gptq' needs calibration"):
        quantize_model(Net(), recipe, progress=False)
    only = Recipe({"b": recipe["b"], "c": "int4"})
    with pytest.raises(ValueError, match="method 'hqq' and None takes no calibration"):
        quantize_model(Net(), only, calibration=[x], progress=False)
    path = tmp_path / "r.json"
    recipe.save(path)
    assert json.loads(path.read_text())["rules"]["d"] == {
        "format": "int2_g32",
        "options": {"damping": 0.05},
    }
    assert Recipe.load(path) == recipe
