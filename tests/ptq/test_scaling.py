"""AWQ and SmoothQuant as methods of quantize_model: who takes scales, the function stays, errors fall."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowbit.methods import quantize
from lowbit.nn import QuantLinear
from lowbit.nn.names import Rule
from lowbit.ptq import quantize_model
from lowbit.ptq.file import quantize_file
from lowbit.ptq.scaling import Group, find_groups, scaled
from lowbit.ptq.smooth import awq_scales, smooth_scales

WIDTH = 64
FORMAT = "int3_g32"


class Block(nn.Module):
    """A gated block with names of transformers, and one that no scale fits: its norm is also added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 96, bias=False)
        self.gate_proj = nn.Linear(WIDTH, 96, bias=False)
        self.down_proj = nn.Linear(96, WIDTH, bias=False)
        self.post = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        gated = nn.functional.silu(self.gate_proj(h)) * self.up_proj(h)
        h = self.post(x + self.down_proj(gated))
        return h + self.mix(h)


class Shifted(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


@pytest.fixture
def model() -> nn.Module:
    """Two blocks whose norms make some channels large, as those of language models do."""
    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block()).eval()
    with torch.no_grad():
        for block in made:
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
                linear.weight.normal_(0, 1 / 8)
            block.norm.weight[::32] = 20
            block.up_proj.weight[::24] *= 10
    return made


def batches(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 16, WIDTH, generator=generator).to(dtype) for _ in range(3)]


GROUPS = [
    Group(f"{i}.{previous}", tuple(f"{i}.{name}" for name in linears))
    for previous, linears in (("norm", ("gate_proj", "up_proj")), ("up_proj", ("down_proj",)))
    for i in range(2)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_are_those_that_change_no_bit(model, dtype):
    model.to(dtype)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    found = find_groups(model, batches(dtype=dtype)[0])
    assert sorted(found, key=str) == sorted(GROUPS, key=str)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_shared_and_shifted_weights_take_no_scales(model):
    model[0].norm = Shifted()
    model[1].gate_proj.weight = model[0].gate_proj.weight
    assert find_groups(model, batches()[0]) == [g for g in GROUPS if "down_proj" in g.linears[0]]


def test_a_weight_that_another_module_has_takes_no_scales(model):
    """Though that one is not called."""
    model[0].spare = nn.Linear(WIDTH, 96, bias=False)
    model[0].spare.weight = model[0].gate_proj.weight
    expected = [g for g in GROUPS if g.previous != "0.norm"]
    assert sorted(find_groups(model, batches()[0]), key=str) == sorted(expected, key=str)


class Crossed(nn.Module):
    """Linears that read two norms, a part of one, and the same one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.both, self.part, self.twice = (
            nn.Linear(WIDTH, 8),
            nn.Linear(WIDTH, 8),
            nn.Linear(WIDTH, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = self.one(x), self.two(x), self.three(x)
        return (
            self.both(one)
            + self.both(two)
            + self.twice(three)
            + self.twice(three)
            + self.part(two[:1])
        )


def test_linears_that_read_more_or_less_than_one_norm():
    model = Crossed().eval()
    assert find_groups(model, batches()[0]) == [Group("three", ("twice",))]


def test_attention_of_transformers():
    """v_proj takes the scales of o_proj with as many heads of values as of queries alone."""
    transformers = pytest.importorskip("transformers")
    for heads in (4, 2):
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=heads, tie_word_embeddings=True,
        )  # fmt: skip
        llama = transformers.LlamaForCausalLM(config).eval()
        found = {g.previous: g.linears for g in find_groups(llama, torch.arange(12)[None])}
        layer = "model.layers.0"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        expected = {
            f"{layer}.input_layernorm": tuple(f"{attention}.{x}_proj" for x in "qkv"),
            f"{layer}.post_attention_layernorm": (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            f"{mlp}.up_proj": (f"{mlp}.down_proj",),
        }
        if heads == 4:
            expected[f"{attention}.v_proj"] = (f"{attention}.o_proj",)
        assert found == expected


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_the_function_stays(model, method):
    model.double()
    rules = {name: Rule(FORMAT, method) for group in GROUPS for name in group.linears}
    x = batches(1, torch.float64)[0]
    with torch.no_grad():
        before, weight = model(x), model[0].up_proj.weight.clone()
        with scaled(model, rules, batches(dtype=torch.float64), keep=True) as folded:
            assert folded == dict.fromkeys(rules)
            assert float((model(x) - before).norm() / before.norm()) < 1e-12
            moved = model[0].up_proj.weight / weight
            assert float(moved.max() / moved.min()) > 1.5
        model.float()
        x = x.float()
        single = model(x)
        with scaled(model, rules, batches(), keep=True):
            assert float((model(x) - single).norm() / single.norm()) < 1e-6


def products(model: nn.Module) -> torch.Tensor:
    """Those of the first gate and up with their inputs."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, args, y: found.append(y.double()))
        for module in (model[0].gate_proj, model[0].up_proj)
    ]
    with torch.no_grad():
        for x in batches():
            model(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize(
    ("method", "format"), [("awq", "int3_g64"), ("smoothquant", "int8_row_a8")]
)
def test_errors_of_outputs_fall(model, method, format):
    """Far below rounding to nearest: of weights, and of weights and activations."""
    expected, errors = products(model), {}
    state = {key: t.clone() for key, t in model.state_dict().items()}
    for how in ("rtn", method):
        made = nn.Sequential(Block(), Block()).eval()
        made.load_state_dict(state)
        given = None if how == "rtn" else batches()
        recipe = {r"0\.(up|gate)_proj": format}
        report = quantize_model(made, recipe, method=how, calibration=given, progress=False)
        assert [row.note for row in report.layers] == [None, None]
        errors[how] = float((products(made) - expected).square().sum())
    assert errors[method] < 0.7 * errors["rtn"], errors


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_are_those_of_the_formulas(model, method):
    """And the weights are scaled, then rounded to nearest; the layer above is divided."""
    block = model[0]
    dense = {
        name: m.weight.detach().clone() for name, m in block.named_modules() if hasattr(m, "weight")
    }
    with torch.no_grad():
        x = torch.cat([block.norm(b) for b in batches()]).flatten(0, -2)
    weights = [dense["gate_proj"], dense["up_proj"]]
    if method == "awq":
        h = x.double().T @ x.double() / len(x)
        s = awq_scales(x.abs().mean(0), h, weights, FORMAT, grid=5)
        options = {"grid": 5}
    else:
        s = smooth_scales(x.abs().amax(0), weights, alpha=0.3)
        options = {"alpha": 0.3}
    recipe = {r"0\.(up|gate)_proj": Rule(FORMAT, method, options)}
    quantize_model(model, recipe, calibration=batches(), progress=False)
    torch.testing.assert_close(block.norm.weight.detach(), dense["norm"] / s, rtol=1e-5, atol=0)
    for name in ("gate_proj", "up_proj"):
        scaled_weight = dense[name] * dense["norm"] / block.norm.weight.detach()
        made = block.get_submodule(name)
        assert isinstance(made, QuantLinear)
        expected = quantize(scaled_weight, FORMAT).dequantize()
        torch.testing.assert_close(made.weight, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model[0].down_proj.weight, dense["down_proj"])


def test_layers_without_scales_are_noted(model):
    report = quantize_model(model, FORMAT, method="awq", calibration=batches(), progress=False)
    notes = {row.name: row.note for row in report.layers}
    note = "no layer before it takes scales: quantized without 'awq'"
    assert {name for name, text in notes.items() if text} == {"0.mix", "1.mix"}
    assert notes["0.mix"] == note


def test_a_model_is_as_it_was_if_anything_raises(model):
    before = {key: t.clone() for key, t in model.state_dict().items()}

    def stop(name: str, *_: object) -> None:
        if name == "1.down_proj":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quantize_model(
            model, {r"\d\.(up|gate|down)_proj": FORMAT}, method="awq", calibration=batches(),
            progress=False, on_layer=stop,
        )  # fmt: skip
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert type(model[0].up_proj) is nn.Linear


BAD = {
    "calibration": ({"method": "awq", "calibration": None}, "method 'awq' needs calibration"),
    "option": ({"options": {"alpha": 0.5}}, "method 'awq' takes no alpha"),
    "grid": ({"options": {"grid": 0}}, "grid must be at least 1, got 0"),
    "kind": ({"options": {"grid": 0.5}}, "grid of method 'awq' must be int, got 0.5"),
    "alpha": ({"method": "smoothquant", "options": {"alpha": 2}}, "alpha must be 0 to 1, got 2"),
    "recipe": ({"format": {r"0\.mix": FORMAT}}, "method 'awq': no layer of the model takes the scales"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(model, arguments, message):
    given = {"format": FORMAT, "method": "awq", "calibration": batches(), **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        quantize_model(model, **given, progress=False)


def test_a_file_takes_no_scales(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="'awq' changes layers .*: it is for quantize_model with"):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", FORMAT, method="awq")
