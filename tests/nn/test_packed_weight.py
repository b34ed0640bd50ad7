"""`weight` of packed layers: what it says of itself, what it computes, and that nothing dense stays."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit import qat
from lowbit.formats import parse
from lowbit.nn import (
    BinaryLinear,
    LLMInt8Linear,
    PackedModule,
    QuantConv2d,
    QuantEmbedding,
    QuantLinear,
)
from lowbit.nn import weight as packed_weight
from lowbit.nn.weight import PackedWeight
from weights import random_weight

N, K = 50, 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def of_fixed_features(dense: nn.Linear) -> nn.Module:
    absmax = torch.ones(K)
    absmax[3] = 9
    return LLMInt8Linear.from_linear(dense, absmax=absmax)


# How a dense layer is made, and the packed one of it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    **{
        name: (lambda: nn.Linear(K, N), lambda d, name=name: QuantLinear.from_linear(d, name))
        for name in ("nf4", "uint4_zfloat", "nvfp4", "int8_row_a8", "nf4_o2", "ternary_trits")
    },
    "no bias": (
        lambda: nn.Linear(K, N, bias=False),
        lambda d: QuantLinear.from_linear(d, "kmeans3_pr"),
    ),
    "embedding": (
        lambda: nn.Embedding(N, K),
        lambda d: QuantEmbedding.from_embedding(d, "int8"),
    ),
    "convolution": (
        lambda: nn.Conv2d(3, 5, (3, 2)),
        lambda d: QuantConv2d.from_conv(d, "int8"),
    ),
    "LLM.int8()": (lambda: nn.Linear(K, N), LLMInt8Linear.from_linear),
    "LLM.int8() of fixed features": (lambda: nn.Linear(K, N), of_fixed_features),
    "binary": (lambda: nn.Linear(K, N), lambda d: BinaryLinear.from_linear(d, "binary")),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    make, pack = LAYERS[kind]
    dense = make().to(dtype)
    return dense, pack(dense)


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight by the canonical tensors alone."""
    if isinstance(layer, QuantConv2d):
        rows = layer.quant_tensor().dequantize(layer.dtype)
        return rows.view(5, 3, 2, 3).permute(0, 3, 1, 2).contiguous()
    if isinstance(layer, PackedModule):
        return layer.quant_tensor().dequantize(layer.dtype)
    weight = layer.quantized.quant_tensor().dequantize(layer.quantized.dtype)
    if layer.features is not None:
        weight[:, layer.features] = layer.columns
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@every_layer
def test_it_describes_the_dense_weight(kind: str, dtype: torch.dtype) -> None:
    dense, layer = pair(kind, dtype)
    w, d = layer.weight, dense.weight
    assert isinstance(w, torch.Tensor)
    assert isinstance(w, nn.Parameter)
    for name in ("shape", "dtype", "device", "ndim", "is_leaf", "layout", "nbytes", "is_cuda"):
        assert getattr(w, name) == getattr(d, name), name
    for name in ("dim", "numel", "nelement", "size", "stride", "element_size", "is_floating_point"):
        assert getattr(w, name)() == getattr(d, name)(), name
    assert len(w) == len(d)
    assert w.requires_grad is False
    assert w.grad is None
    assert w.requires_grad_(False) is w
    assert "PackedWeight" in repr(w)
    assert layer.to(torch.float16).weight.dtype == torch.float16
    assert layer.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("dtype", DTYPES)
@every_layer
def test_it_computes_as_the_dequantized_weight(kind: str, dtype: torch.dtype) -> None:
    layer = pair(kind, dtype)[1]
    d = dequantized(layer)
    assert d.dtype == dtype
    results = {
        "detach": lambda w: w.detach(),
        "data": lambda w: w.data,
        "clone": lambda w: w.clone(),
        "float": lambda w: w.float(),
        "double": lambda w: w.to(torch.float64),
        "flatten": lambda w: w.flatten(1),
        "matmul": lambda w: w.flatten(1) @ torch.ones(w[0].numel(), 2, dtype=dtype),
        "index": lambda w: w[1:3],
        "one": lambda w: w[0].sum(),
        "sum": lambda w: w.sum(0) + w.abs().max(),
        "stack": lambda w: torch.stack([w, w]),
        "copy": lambda w: torch.zeros_like(d).copy_(w),
        "numpy": lambda w: torch.as_tensor(np.asarray(w.float())),
        "list": lambda w: torch.tensor(w.tolist()),
        "iterate": lambda w: torch.cat([row.flatten() for row in w]),
        "where": lambda w: torch.where(w > 0, w, 0),
    }
    for name, compute in results.items():
        got, expected = compute(layer.weight), compute(d)
        assert (got.shape, got.stride(), got.dtype) == (
            d.shape,
            d.stride(),
            d.dtype,
        ) or name != "detach"
        assert torch.equal(got, expected), name
        assert got.stride() == expected.stride(), name
    if d.dim() == 2:
        assert torch.equal(layer.weight.T, d.T)


def test_functions_take_it() -> None:
    layer = pair("nf4")[1]
    d, x, ids = dequantized(layer), torch.randn(3, K), torch.tensor([[0, 7], [49, 0]])
    assert torch.equal(F.linear(x, layer.weight, layer.bias), F.linear(x, d, layer.bias))
    assert torch.equal(x @ layer.weight.t(), x @ d.t())
    assert torch.equal(
        torch.addmm(layer.bias, x, layer.weight.t()), torch.addmm(layer.bias, x, d.t())
    )
    assert torch.equal(F.embedding(ids, layer.weight), F.embedding(ids, d))
    assert torch.equal(torch.einsum("mk,nk->mn", x, layer.weight), torch.einsum("mk,nk->mn", x, d))
    conv = pair("convolution")[1]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(
        F.conv2d(x, conv.weight, conv.bias), F.conv2d(x, dequantized(conv), conv.bias)
    )


@pytest.mark.parametrize("kind", ["nf4", "LLM.int8() of fixed features"])
def test_gradients_pass_through(kind: str) -> None:
    layer = pair(kind)[1]
    d, x = dequantized(layer), torch.randn(3, K)
    grads = []
    for w in (layer.weight, d):
        leaf = x.clone().requires_grad_()
        (F.linear(leaf, w).square().sum() + (w @ leaf.t()).cos().sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_backward_uses_the_weight_of_forward() -> None:
    layer, other = pair("nf4")[1], pair("nf4")[1]
    d = dequantized(layer)
    x = torch.randn(K, 2, requires_grad=True)
    y = layer.weight @ x
    layer.load_state_dict(other.state_dict())
    y.sum().backward()
    assert torch.equal(x.grad, d.t() @ torch.ones(N, 2))


@every_layer
def test_nothing_of_it_stays(kind: str) -> None:
    layer = pair(kind)[1]

    def held() -> int:
        return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))

    names = [n for n, _ in (*layer.named_parameters(), *layer.named_buffers())]
    state, before, attributes = [*layer.state_dict()], held(), {*vars(layer)}
    numel = layer.weight.numel()
    layer.weight.flatten(1) @ torch.ones(layer.weight[0].numel(), 2)
    assert [n for n, _ in (*layer.named_parameters(), *layer.named_buffers())] == names
    assert [*layer.state_dict()] == state
    assert "weight" not in names
    assert held() == before
    assert {*vars(layer)} == attributes
    gc.collect()
    dense = [
        t
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.is_floating_point() and t.numel() == numel
    ]
    assert not any(torch.equal(t.flatten(), layer.weight.flatten()) for t in dense)


@every_layer
def test_copies_and_pickles_of_the_layer(kind: str) -> None:
    layer = pair(kind)[1]
    expected = dequantized(layer)
    _ = layer.weight
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight.clone(), expected)
        assert other.weight.owner is other
    assert torch.equal(copy.deepcopy(layer.weight), expected)
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
    "normal_": lambda w: nn.init.normal_(w),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].fill_(1),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "data +=": lambda w: setattr(w, "data", w.data.add_(1)),
    "data[:]": lambda w: w.data.__setitem__(slice(None), 0),
    "detach mul_": lambda w: w.detach().mul_(1),
    "view": lambda w: w.view(-1).zero_(),
    "unbind": lambda w: w.unbind()[1].zero_(),
    "transposed": lambda w: w.transpose(0, 1).normal_(),
    "data": lambda w: setattr(w, "data", torch.zeros(w.shape)),
    "requires_grad": lambda w: w.requires_grad_(),
    "requires_grad attribute": lambda w: setattr(w, "requires_grad", True),
    "data_ptr": lambda w: w.data_ptr(),
    "share_memory_": lambda w: w.share_memory_(),
    "out": lambda w: torch.add(torch.zeros(w.shape), 1, out=w),
    "div_ by a matrix": lambda w: w.div_(torch.ones(w.shape)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@every_layer
def test_it_is_not_written(kind: str, write) -> None:
    layer = pair(kind)[1]
    before = dequantized(layer)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="is packed"):
        write(layer.weight)
    assert torch.equal(dequantized(layer), before)


@pytest.mark.parametrize("name", ["nf4", "int8", "q5_1", "uint4_zfloat", "nvfp4", "nf4_g64_dq8"])
def test_powers_of_two_scale_it_in_place(name: str) -> None:
    layer = QuantLinear.from_quant_tensor(random_weight(parse(name), N, K))
    head = QuantLinear.tied_to(layer)
    before = dequantized(layer)
    layer.weight.mul_(4)
    assert torch.equal(dequantized(layer), before * 4)
    assert torch.equal(dequantized(head), before * 4)
    w = layer.weight
    w.div_(8)
    assert torch.equal(w.clone(), before / 2)
    layer.weight.mul_(1)
    layer.weight.div_(torch.tensor(0.5))
    assert torch.equal(dequantized(layer), before)
    for factor in (0.3, float("inf"), 1e-30):
        with pytest.raises(NotImplementedError, match="cannot be multiplied by"):
            layer.weight.mul_(factor)
    assert torch.equal(dequantized(layer), before)


def test_learnable_scales_are_not_left_without_a_gradient() -> None:
    layer = pair("nf4")[1]
    layer.train_parameters(("scales",))
    with pytest.raises(NotImplementedError, match=r"\['scales'\] of a QuantLinear are learnable"):
        F.linear(torch.randn(2, K), layer.weight)
    assert torch.equal(layer.weight.detach().clone(), dequantized(layer))
    with torch.no_grad():
        assert torch.equal(layer.weight.clone(), dequantized(layer))
    with pytest.raises(NotImplementedError, match=r"\['scales'\] are learnable"):
        layer.weight.mul_(2)


@every_layer
def test_it_is_not_replaced(kind: str) -> None:
    layer = pair(kind)[1]
    before = dequantized(layer)
    layer.weight = layer.weight
    for value in (nn.Parameter(before.clone()), before.clone(), None, pair(kind)[1].weight):
        with pytest.raises(TypeError, match="is packed and cannot be set or tied"):
            layer.weight = value
    with pytest.raises(KeyError, match="weight"):
        layer.register_parameter("weight", nn.Parameter(before))
    assert torch.equal(dequantized(layer), before)
    assert "weight" not in layer._parameters


def test_ties() -> None:
    embedding = QuantEmbedding.from_embedding(nn.Embedding(N, K), "int8")
    head = QuantLinear.tied_to(embedding)
    head.weight = embedding.weight
    assert torch.equal(head.weight.clone(), embedding.weight.clone())
    dense = nn.Linear(K, N, bias=False)
    own = dense.weight
    with pytest.raises(NotImplementedError, match="a dense layer tied to a packed one"):
        dense.weight = embedding.weight
    with pytest.raises(NotImplementedError, match="a dense layer tied to a packed one"):
        dense.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
    assert dense.weight is own
    dense.weight = nn.Parameter(embedding.weight.clone())
    assert torch.equal(dense.weight, embedding.weight)


def test_it_is_logged_once_for_each_kind_and_function(caplog: pytest.LogCaptureFixture) -> None:
    packed_weight._log.cache_clear()
    layer, other = pair("nf4")[1], pair("embedding")[1]
    with caplog.at_level(logging.WARNING, "lowbit"):
        for _ in range(3):
            _ = layer.weight.shape, layer.weight.dtype, layer.weight.device, layer.weight.numel()
        assert not caplog.records
        for _ in range(3):
            layer.weight.t().detach()[0]
            layer.weight.clone()
            other.weight.clone()
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        f"the weight of a {kind} is dequantized in every call that asks for it, here clone"
        for kind in ("QuantLinear", "QuantEmbedding")
    ]


# BinaryLinear looks its format up; Dynamo says so.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@every_layer
def test_compiled_layers_do_not_see_it(kind: str) -> None:
    layer = pair(kind)[1]
    x = torch.tensor([1, 2]) if kind == "embedding" else torch.randn(2, K)
    x = torch.randn(1, 3, 5, 5) if kind == "convolution" else x
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_compiled_code_may_ask_for_it() -> None:
    layer = pair("nf4")[1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(self.inner.weight.dtype)
            return F.linear(x, self.inner.weight) + x @ self.inner.weight.T

    net, x = Net(), torch.randn(2, K)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
        traced = torch.jit.trace(net, (x,), check_trace=False)
        assert torch.equal(traced(x), net(x))


def test_a_convolution_that_trains_has_the_weight_that_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, (3, 2)))
    own = model[0].weight.detach().clone()
    qat.prepare(model, qat.Spec(qat.TWN))
    model[0].weight.sum().backward()
    assert torch.equal(model[0].weight, own)
    assert torch.equal(model[0].linear.weight.grad, torch.ones(5, 18))


def test_weights_of_layers_that_are_made_empty() -> None:
    for dtype in DTYPES:
        assert QuantLinear(K, N, False, format="nf4", dtype=dtype).weight.dtype == dtype
        assert QuantEmbedding(N, K, format="nf4", dtype=dtype).weight.dtype == dtype
        with torch.device("meta"):
            w = QuantLinear(K, N, format="nf4", dtype=dtype).weight
        assert (w.device.type, w.dtype) == ("meta", dtype)
        assert type(w) is PackedWeight
