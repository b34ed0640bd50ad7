"""Programs as graphs: the same function in float64, norms folded, and errors that name what has no integer form."""

from __future__ import annotations

import copy
from typing import Any

import integer_models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export

from lowbit.integer import trace
from lowbit.integer.graph import Clamp, Conv, Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def traced(model: nn.Module, x: Tensor) -> Any:
    return trace(integer_models.program_of(model, x))


@pytest.mark.parametrize("make", [integer_models.DigitsCNN, integer_models.SignalNet])
def test_folding_is_exact(make: type[nn.Module]) -> None:
    """BatchNorm before, behind and without a convolution; to 1e-10 of the module in float64, and no norm is left."""
    model = integer_models.random_norms(make()).double()
    shape = (1, 8, 8) if make is integer_models.DigitsCNN else (9, 64)
    x = torch.randn(5, *shape, dtype=torch.float64)
    graph = traced(copy.deepcopy(model), x)
    with torch.no_grad():
        assert (graph(x) - model.eval()(x)).abs().max() < 1e-10
    assert "Norm" not in {type(node).__name__ for node in graph.nodes}
    # Every ReLU but that of a result that others read, too, is part of the node before it.
    clamps = [node.name for node in graph.nodes if isinstance(node, Clamp)]
    assert clamps == ([] if make is integer_models.DigitsCNN else ["hardtanh"])


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """function(x)."""
        result: Tensor = self.function(x)
        return result


def overwritten(x: Tensor) -> Tensor:
    """A result that is changed in place after it was named."""
    y = x + x
    z = y.view(y.shape[0], -1)
    y.relu_()
    return z + z


OPS = {
    "relu6": (F.relu6, (3, 5)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.25), (3, 5)),
    "clamp": (lambda x: x.clamp(min=-0.5), (7,)),
    "in place": (overwritten, (3, 5)),
    "max, ceil that changes nothing": (lambda x: F.max_pool2d(x, 2, ceil_mode=True), (3, 4, 6)),
    "max1d": (lambda x: F.max_pool1d(x, 3, 2, 1), (3, 8)),
    "avg1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), (3, 8)),
    "avg, uncounted": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (3, 5, 4)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), (3, 4, 5)),
    "mean": (lambda x: x.mean((2, 3)), (3, 4, 5)),
    "mean, kept": (lambda x: x.mean(-1, keepdim=True), (3, 4)),
    "cat": (lambda x: torch.cat([x, x + x], -1), (3, 4)),
    "squeeze": (lambda x: x.unsqueeze(1).relu().squeeze(1), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_that_of_torch(name: str) -> None:
    function, shape = OPS[name]
    x = torch.randn(4, *shape, dtype=torch.float64)
    expected = function(x.clone())
    got = traced(Of(function), x)(x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 4, padding="same"),
        nn.Conv1d(4, 6, 3, 2, padding=1, dilation=2, groups=2),
        nn.Conv1d(4, 4, 3, padding="valid", groups=4, bias=False),
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2),
        nn.Conv2d(4, 6, 4, padding="same", dilation=(1, 3)),
    ],
    ids=str,
)
def test_a_convolution_is_that_of_torch(conv: nn.Module) -> None:
    shape = (4, 9) if isinstance(conv, nn.Conv1d) else (4, 9, 7)
    x = torch.randn(3, *shape, dtype=torch.float64)
    graph = traced(conv.double(), x)
    (node,) = graph.nodes
    assert isinstance(node, Conv)
    with torch.no_grad():
        assert (graph(x) - conv(x)).abs().max() < 1e-12


def test_a_result_that_others_read_keeps_its_norm_and_relu_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y).relu() + y

    model = integer_models.random_norms(Two()).double().eval()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    graph = traced(model, x)
    assert [type(node).__name__ for node in graph.nodes] == ["Conv", "Conv", "Add"]
    with torch.no_grad():
        assert (graph(x) - model(x)).abs().max() < 1e-12


class Nested(nn.Module):
    """What it is given, two levels down."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), inner)

    def forward(self, x: Tensor) -> Tensor:
        """encoder(x)."""
        result: Tensor = self.encoder(x)
        return result


NO_FORM = [
    (Nested(nn.Tanh()), (6,), r"encoder\.1 \(tanh\): aten\.tanh\.default has no integer form"),
    (
        Nested(nn.Softmax(1)),
        (6, 6),
        r"encoder\.1 \(softmax\): aten\.softmax\.int must be taken over the last",
    ),
    (
        Nested(nn.LayerNorm((6, 6))),
        (6, 6),
        r"encoder\.1 \(layer_norm\): .* must be taken over the last",
    ),
    (Of(lambda x: x * -2), (6,), r"aten\.mul\.Tensor must be by a positive number"),
    (Of(lambda x: x * x), (6,), r"aten\.mul\.Tensor must be by a positive number"),
    (
        Of(lambda x: x @ x[:, :1]),
        (2, 6, 6),
        r"multiplies shapes .* that are not of one kind",
    ),
    (
        Of(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (4, 6),
        r"has a mask, dropout, causality or groups",
    ),
    (
        Of(lambda x: x.transpose(0, 1).relu()),
        (6,),
        r"takes transpose, whose batch is not its first",
    ),
    (Of(lambda x: x.transpose(0, 1)[:, 1]), (6,), r"takes a part of the batch"),
    (Of(lambda x: x[:, ::2]), (6,), r"takes a part of the batch, or not every element"),
    (Of(lambda x: x + 2), (6,), r"takes 2 where a result of the network is expected"),
    (Of(lambda x: x + x[:, :1]), (6,), r"adds shapes \[\(6,\), \(1,\)\] that differ"),
    (Of(lambda x: torch.add(x, x, alpha=3)), (6,), r"has alpha 3"),
    (Of(lambda x: x.clamp(min=0.5)), (6,), r"clamps to 0\.5 \.\. inf, which 0 is not in"),
    (Of(lambda x: x.mean(1)), (3, 4, 5), r"must be taken over all dimensions behind"),
    (Of(lambda x: F.avg_pool2d(x, 2, divisor_override=3)), (1, 4, 4), r"divides by a number"),
    (Of(lambda x: F.max_pool2d(x, 2, ceil_mode=True)), (1, 5, 5), r"windows that end outside"),
    (Of(lambda x: F.adaptive_avg_pool2d(x, 2)), (1, 5, 4), r"windows of several sizes"),
]


@pytest.mark.parametrize(("model", "shape", "message"), NO_FORM, ids=[m for _, _, m in NO_FORM])
def test_what_has_no_integer_form_is_named(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        traced(model, torch.randn(3, *shape))


def test_bad_programs() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match="program must be a torch.export.ExportedProgram, got"):
        trace(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must compute its result from its input"):
        traced(Of(lambda x: x.view(x.shape)), x)
    with pytest.raises(ValueError, match="results must keep the batch of"):
        trace(export(Of(lambda x: x.reshape(4, 2).relu()), (x,)))
    with pytest.raises(ValueError, match="the program must take one tensor and return one"):
        trace(export(Of(lambda x: (x.relu(), x)), (x,)))
    training = export(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (x,))
    with pytest.raises(ValueError, match="change no buffer"):
        trace(training)
    with pytest.raises(NotImplementedError, match="dropout|bernoulli|rand"):
        trace(export(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), (x,)))
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="a weight or bias is NaN or infinite"):
        traced(broken, x)


def test_a_linear_over_rows() -> None:
    linear = nn.Linear(5, 3).double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    graph = traced(linear, x)
    (node,) = graph.nodes
    assert isinstance(node, Linear)
    assert node.macs == 4 * 6 * 3 * 5
    with torch.no_grad():
        assert (graph(x) - linear(x)).abs().max() < 1e-12
