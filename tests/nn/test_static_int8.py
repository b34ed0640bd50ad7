"""Static scales of int8 activations: the layer, its state, files, fused siblings, quantize_model, and accuracy."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lowbit
from lowbit import int8
from lowbit.nn import QuantLinear, fuse
from lowbit.ptq import OBSERVERS, attach, quantize_model


def layer(n: int = 70, k: int = 96, format: str = "int4_g32_a8") -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(k, n), format)


@pytest.mark.parametrize(
    "name", ["int4_g32_a8", "int8_row_a8", "nf4_a8t", "uint4_g32_a8", "kmeans4_a8t"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_static_is_the_product_of_given_codes(name: str, dtype: torch.dtype):
    linear = layer(format=name)
    linear.set_input_scale(0.02)
    for shape in ((2, 5, 96), (0, 96), (96,)):
        x = torch.randn(shape).to(dtype)
        q, scales = int8.quantize(x.view(-1, 96), scale=0.02)
        want = int8.linear(q, scales, linear.quant_tensor(), linear.bias, dtype)
        y = linear(x)
        assert y.dtype == dtype
        assert torch.equal(y, want.view(*shape[:-1], 70))
        again = int8.static_linear(x, linear.input_scale, linear.quant_tensor(), linear.bias)
        assert torch.equal(again, y)
    # It saturates, where a scale per row follows the row.
    x = torch.full((1, 96), 100.0, dtype=dtype)
    assert torch.equal(linear(x), linear(torch.full((1, 96), 127 * 0.02, dtype=dtype)))
    dynamic = QuantLinear.from_quant_tensor(linear.quant_tensor(), linear.bias)
    assert torch.equal(dynamic(x), lowbit.linear(x, linear.quant_tensor(), linear.bias))
    linear.set_input_scale(None)
    assert torch.equal(linear(x), dynamic(x))


def test_state_dicts_copies_and_casts_keep_the_scale():
    linear = layer()
    linear.set_input_scale(0.03)
    x = torch.randn(4, 96)
    y = linear(x)
    assert "input_scale" in linear.state_dict()
    other = QuantLinear(96, 70, format="int4_g32_a8")
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), y)
    other.input_scale.data.fill_(1)
    assert float(linear.input_scale) == float(torch.tensor(0.03))
    assert torch.equal(copy.deepcopy(linear)(x), y)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    assert copy.deepcopy(linear).half().input_scale.dtype == torch.float32
    assert "static input scale" in repr(linear)
    # Tied layers have inputs of their own.
    tied = QuantLinear.tied_to(linear)
    assert tied.input_scale is None
    assert dict(linear.named_parameters())["input_scale"].requires_grad is False
    state = layer().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*input_scale"):
        linear.load_state_dict(state)
    with pytest.raises(RuntimeError, match="scale must be one positive, finite number"):
        linear.load_state_dict({**linear.state_dict(), "input_scale": torch.tensor(-1.0)})
    plain = layer(format="int4_g32")
    with pytest.raises(RuntimeError, match="does not quantize activations"):
        plain.load_state_dict({**plain.state_dict(), "input_scale": torch.tensor(1.0)})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize("into", ["dense", "dynamic", "static", "meta"])
def test_files_keep_the_scale(into: str, tmp_path):
    batches = [torch.randn(8, 64) for _ in range(3)]
    model = nn.Sequential(Attention(), nn.Linear(32, 5))
    options = {"progress": False}
    other = copy.deepcopy(model)
    quantize_model(model, "int4_g32_a8", observer="minmax", calibration=batches, **options)
    path = lowbit.save(model, tmp_path / "model.safetensors")
    if into == "meta":
        other = other.to("meta")
    elif into != "dense":
        more = {"observer": "kl", "calibration": batches} if into == "static" else {}
        quantize_model(other, "int4_g32_a8", **more, **options)
    lowbit.load(other, path)
    assert torch.equal(other(batches[0]), model(batches[0]))
    assert other[1].input_scale == model[1].input_scale
    dynamic = lowbit.quantize_model(copy.deepcopy(Attention()), "int4_g32_a8", **options)
    assert dynamic.layers
    static = nn.Sequential(Attention(), nn.Linear(32, 5))
    quantize_model(static, "int4_g32_a8", **options)
    dynamic_path = lowbit.save(static, tmp_path / "dynamic.safetensors")
    if into == "static":
        with pytest.raises(ValueError, match=r"1.input_scale is missing in the file"):
            lowbit.load(model, dynamic_path)


def test_static_layers_are_not_fused():
    model = Attention()
    quantize_model(model, "int4_g32_a8", progress=False)
    assert model.q_proj._siblings is None
    assert fuse(model) == 1
    x = torch.randn(3, 64)
    before = model.k_proj(x)
    model.q_proj.set_input_scale(0.5)
    assert model.k_proj._siblings is None
    assert torch.equal(model.k_proj(x), before)
    assert fuse(model) == 0
    model.q_proj.set_input_scale(None)
    assert fuse(model) == 1


def test_compile_without_graph_break():
    linear = layer()
    linear.set_input_scale(0.03)
    x = torch.randn(4, 96)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), linear(x))


def test_bad_arguments():
    linear = layer()
    for bad in (0.0, -1.0, torch.nan, torch.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="scale must be one positive, finite number"):
            linear.set_input_scale(bad)
    with pytest.raises(ValueError, match="'int4_g32' does not quantize activations"):
        layer(format="int4_g32").set_input_scale(1.0)
    linear.set_input_scale(1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 96\), got \(2, 95\)"):
        linear(torch.zeros(2, 95))
    with pytest.raises(ValueError, match="no gradients"):
        linear(torch.zeros(2, 96, requires_grad=True))


def test_quantize_model_finds_the_scales():
    """Of the linears whose format wants int8, from the inputs of the dense model."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.Linear(64, 3))
    batches = [torch.randn(9, 64) for _ in range(4)]
    recipe = {"0|2": "int4_g16_a8", "3": "int4"}
    for name, observer in OBSERVERS.items():
        for method in (None, "gptq") if name == "mse" else (None,):
            made, watch = copy.deepcopy(model), {n: observer() for n in ("0", "2")}
            with attach(model, watch):
                for batch in batches:
                    model(batch)
            quantize_model(
                made, recipe, method=method, observer=name, calibration=batches, progress=False
            )
            for n, seen in watch.items():
                wanted = torch.tensor(seen.grid().scale, dtype=torch.float32)
                assert torch.equal(made.get_submodule(n).input_scale, wanted)
            assert made[3].input_scale is None
    for arguments, message in (
        ({"observer": "minmax"}, "observer 'minmax' needs calibration"),
        ({"observer": "x", "calibration": batches}, "observer must be one of .* got 'x'"),
        ({"format": "int4", "observer": "kl", "calibration": batches}, "the model has none"),
        (
            {"observer": "kl", "calibration": [torch.zeros(0, 64)]},
            "calibration is empty or 0, for every layer: 0: no input has reached it",
        ),
    ):
        dense = copy.deepcopy(model)
        with pytest.raises(ValueError, match=message):
            quantize_model(dense, **{"format": recipe, "progress": False, **arguments})
        assert type(dense[0]) is nn.Linear


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A multi-layer perceptron that has learned scikit-learn's digits; calibration and test data."""
    datasets = pytest.importorskip("sklearn.datasets")
    torch.manual_seed(0)
    x, y = (torch.from_numpy(a) for a in datasets.load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(y))
    train, test = order[:1000], order[1000:]
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model, x[train], x[test], y[test]


@pytest.mark.parametrize("observer", [None, *OBSERVERS])
def test_w8a8_keeps_the_accuracy_of_digits(observer: str | None, digits):
    """At most half a per cent less than fp32, per row (dynamic) and with every observer (static)."""
    model, train, x, y = digits
    made = copy.deepcopy(model)
    static = {"observer": observer, "calibration": list(train.split(100))} if observer else {}
    quantize_model(made, "int8_row_a8", progress=False, **static)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    assert accuracy(model) > 0.9
    assert accuracy(made) >= accuracy(model) - 0.005
