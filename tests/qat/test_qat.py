"""Layers that train through quantizers, prepare and convert, trained centroids, and convolutions as linears."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import qat
from lowbit.formats import Format
from lowbit.nn import BinaryLinear, QuantConv2d, QuantLinear
from lowbit.nn.product import PackedProduct

SPECS = {
    "int4": qat.Spec("int4_g32"),
    "lsq": qat.Spec(partial(qat.LSQ, format="int3_row_fp32"), partial(qat.LSQActivation, 3)),
    "ttq pact": qat.Spec(qat.TTQ, partial(qat.PACT, 4)),
    "dorefa": qat.Spec(partial(qat.DoReFa, bits=2), partial(qat.DoReFaActivation, 4)),
    "xnor": qat.Spec(qat.BWN, qat.XNORActivation),
    "bitnet": qat.Spec(qat.BitNet, qat.Int8Activation),
    "means": qat.Spec(partial(qat.ClusterMeans, bits=2)),
    "idkm": qat.Spec(partial(qat.SoftKMeans, bits=2, tau=0.01)),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


class Net(nn.Module):
    """One convolution, one 1x1 convolution, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 5, 1, stride=2)
        self.fc = nn.Linear(45, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x (B, 2, 5, 5)."""
        x = self.point(self.conv(x).relu()).relu().flatten(1)
        return self.head(self.fc(x).relu())


def fake_layers(model: nn.Module) -> list[qat.FakeQuantLinear]:
    return [m for m in model.modules() if isinstance(m, qat.FakeQuantLinear)]


@pytest.mark.parametrize("name", SPECS)
def test_prepare_train_convert(name: str) -> None:
    torch.manual_seed(5)
    model = Net()
    labels = torch.randint(3, (24,))
    x = torch.rand(24, 2, 5, 5)
    x[labels == 1, 0] += 1
    x[labels == 2, 1] += 1
    assert qat.prepare(model, SPECS[name], skip=["head"]) == ["conv", "point", "fc"]
    assert isinstance(model.head, nn.Linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    model.eval()
    with torch.no_grad():
        expected = model(x)
        weights = [layer.quantizer(layer.weight) for layer in fake_layers(model)]
    assert len(qat.convert(model)) == 3
    assert fake_layers(model) == []
    packed = [m for m in model.modules() if isinstance(m, PackedProduct)]
    for layer, weight in zip(packed, weights, strict=True):
        assert torch.equal(layer.quant_tensor().dequantize(), weight)
    with torch.no_grad():
        y = model(x)
        # Three sums of at most 45 products of numbers around 1 in fp32, in another order. A sum may fall on the other
        # side of a boundary of the next layer's activations, for one sample in a hundred at most.
        bad = ~torch.isclose(y, expected, rtol=1e-4, atol=1e-4).all(1)
    assert bad.sum() <= (1 if SPECS[name].activation else 0)
    kinds = {BinaryLinear} if name == "xnor" else {QuantConv2d, QuantLinear}
    assert {type(layer) for layer in packed} == kinds
    assert all((layer.format.activation == "int8") == (name == "bitnet") for layer in packed)


def test_recipe_by_name_and_shared_layers() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["twin"] = model["a"]
    recipe = {"b": None, "a|b|twin": qat.Spec("nf4"), "c": qat.Spec(qat.TWN)}
    assert qat.prepare(model, recipe) == ["a", "c", "twin"]
    assert model["a"] is model["twin"]
    assert isinstance(model["a"].quantizer, qat.STE)
    assert isinstance(model["c"].quantizer, qat.TWN)
    assert type(model["b"]) is nn.Linear
    assert qat.convert(model) == ["a", "c", "twin"]
    assert model["a"] is model["twin"]


def test_what_prepare_leaves_and_refuses() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="recipe matches no linear"):
        qat.prepare(attention.self_attn, qat.Spec("nf4"))
    with pytest.raises(ValueError, match="it is one itself"):
        qat.prepare(nn.Linear(2, 2), qat.Spec("nf4"))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(NotImplementedError, match="0: groups must be 1, got 2"):
        qat.prepare(grouped, qat.Spec("nf4"))
    with pytest.raises(TypeError, match="skip must be a sequence"):
        qat.prepare(grouped, qat.Spec("nf4"), skip="0")
    with pytest.raises(ValueError, match="model has no FakeQuantLinear"):
        qat.convert(grouped)
    vectors = nn.Sequential(nn.Linear(8, 8))
    qat.prepare(vectors, qat.Spec(partial(qat.SoftKMeans, bits=2, dim=2)))
    with pytest.raises(NotImplementedError, match="0: vectors of dim 2 have no packed kernel"):
        qat.convert(vectors)
    assert isinstance(vectors[0], qat.FakeQuantLinear)
    with pytest.raises(ValueError, match="use its convert"):
        qat.convert(vectors[0])


def test_state_dict_round_trip() -> None:
    def make() -> nn.Module:
        model = Net()
        qat.prepare(model, SPECS["lsq"])
        model(torch.rand(2, 2, 5, 5))
        return model

    one, two = make().eval(), make().eval()
    x = torch.rand(3, 2, 5, 5)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    assert torch.equal(copy.deepcopy(one)(x), two(x))


def test_bit_linear() -> None:
    layer = qat.BitLinear(64, 10)
    x = torch.randn(2, 7, 64)
    y = layer(x)
    q = (x * 127 / x.abs().amax(-1, keepdim=True)).round()
    gamma = layer.weight.abs().mean()
    codes = (layer.weight / gamma).round().clamp(-1, 1)
    expected = (q @ codes.T) * gamma * x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    packed = layer.convert()
    assert packed.format.activation == "int8"
    # The sum of integers is exact in the kernel; the fake layer rounds K products.
    torch.testing.assert_close(packed(x), y.detach(), rtol=1e-5, atol=64 * 2**-23)
    assert packed.quant_tensor().bits_per_weight < 2.6


def test_binary_linear_is_the_fake_layer() -> None:
    dense = nn.Linear(100, 6)
    fake = qat.FakeQuantLinear.from_linear(dense, SPECS["xnor"])
    x = torch.randn(2, 5, 100)
    layer = fake.convert()
    torch.testing.assert_close(layer(x), fake(x).detach(), rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


# Trained centroids


def test_tables_get_the_sum_of_the_gradients_of_their_weights() -> None:
    dense = nn.Sequential(nn.Linear(40, 6))
    layer = QuantLinear.from_linear(dense[0], Format.lut(bits=2, group=None, scale=None))
    labels, model = layer.quant_tensor().unpack().long(), nn.Sequential(layer)
    bias, table = qat.train_tables(model)
    x, g = torch.randn(9, 40), torch.randn(9, 6)
    (model(x) * g).sum().backward()
    dw = g.T @ x
    expected = torch.stack([dw[labels == e].sum() for e in range(4)])
    # Sums of 9 and then about 60 products in fp32.
    torch.testing.assert_close(table.grad, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad, g.sum(0))
    assert len(qat.train_tables(model, bias=False)) == 1
    with pytest.raises(ValueError, match="no packed linear or convolution whose format is fitted"):
        qat.train_tables(dense)


def test_parameters_can_be_made_learnable_again() -> None:
    layer = QuantLinear.from_linear(nn.Linear(40, 6), "kmeans3_pr")
    first = layer.train_parameters(["table"])[0]
    with torch.no_grad():
        first.mul_(2)
    second = layer.train_parameters(["table", "bias"])[1]
    assert second is layer.table
    assert torch.equal(second, first)
    assert layer.train_parameters(()) == []
    assert torch.equal(layer.quant_tensor().table, first)


def test_cluster_means_are_weights_overwritten_after_each_step() -> None:
    """The rule of the tutorial: SGD on all weights, then every weight becomes the mean of its cluster."""
    start = torch.randn(5, 30)
    quantizer = qat.ClusterMeans(start, 2)
    labels = quantizer.labels.long()

    def project(w: Tensor) -> Tensor:
        return torch.stack([w[labels == e].mean() for e in range(4)])[labels]

    ours = nn.Parameter(start.clone())
    theirs = nn.Parameter(project(start))
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (ours, theirs)]
    x, target = torch.randn(20, 30), torch.randn(20, 5)
    for _ in range(10):
        for weight, optimizer in zip((quantizer(ours), theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(x @ weight.T, target).backward()
            optimizer.step()
        with torch.no_grad():
            theirs.copy_(project(theirs))
    torch.testing.assert_close(quantizer(ours).detach(), theirs.detach(), rtol=1e-5, atol=1e-5)
    assert len(quantizer(ours).unique()) == 4


# Convolutions

GEOMETRIES = {
    "3x3": {"kernel_size": 3},
    "padded, strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1, strided": {"kernel_size": 1, "stride": (2, 3), "padding": 1},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 1), "stride": (1, 2), "padding": (2, 1)},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_is_that_of_torch(name: str, bias: bool) -> None:
    conv = nn.Conv2d(3, 7, bias=bias, **GEOMETRIES[name]).eval()
    layer = QuantConv2d.from_conv(conv, "nf4_g16_fp32")
    assert not layer.training
    dense = copy.deepcopy(conv).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 9, 8)
    expected = dense(x.double())
    y = layer(x)
    assert y.shape == expected.shape
    # Sums of at most 36 products in fp32.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_conv_has_gradients_and_learns_tables() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    layer = QuantConv2d.from_conv(conv, "kmeans2_pr")
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    parameters = qat.train_tables(layer)
    layer(x).square().sum().backward()
    weight = layer.weight.detach() + 0
    other = x.detach().clone().requires_grad_()
    F.conv2d(other, weight, conv.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert parameters[0].grad.abs().sum() > 0


def test_conv_refuses() -> None:
    with pytest.raises(TypeError, match="conv must be an nn.Conv2d, got Linear"):
        QuantConv2d.from_conv(nn.Linear(2, 2), "nf4")
    with pytest.raises(NotImplementedError, match="groups must be 1, got 4"):
        qat.prepare(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "lsq")
    with pytest.raises(NotImplementedError, match="with groups .4. takes activations as they are"):
        QuantConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), "int8_a8")

    class Other(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(NotImplementedError, match="conv is a Other"):
        QuantConv2d.from_conv(Other(2, 2, 1), "nf4")


@pytest.mark.parametrize("name", ["idkm", "xnor", "lsq", "bitnet"])
def test_a_converted_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = Net()
        qat.prepare(model, SPECS[name])
        model(torch.rand(4, 2, 5, 5))
        qat.convert(model)
        return model.eval()

    model, other = make(), make()
    x = torch.rand(2, 2, 5, 5)
    with torch.no_grad():
        assert not torch.equal(model(x), other(x))
        lowbit.save(model, tmp_path / "model.safetensors")
        assert torch.equal(lowbit.load(other, tmp_path / "model.safetensors")(x), model(x))


def test_explain_names_a_kernel() -> None:
    layer = qat.FakeQuantLinear.from_linear(nn.Linear(64, 32), SPECS["bitnet"]).convert()
    assert "reference" not in lowbit.explain(torch.randn(1, 64), layer.quant_tensor()).selected
