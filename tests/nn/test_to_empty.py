"""Layers on the meta device and `to_empty`, as large models are made before their weights are read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit import nn as lnn
from lowbit.formats import parse
from weights import random_weight

FORMATS = (
    "nf4",
    "uint4",
    "kmeans3_pr",
    "nvfp4",
    "nf4_g64_dq8",
    "int3_g64_o4",
    "nf4_o1_fp32",
    "int8_row_a8",
)
N, K = 33, 128


@pytest.mark.parametrize("start", ("meta", "cpu"))
@pytest.mark.parametrize("format", (*FORMATS, "int4_g32_o8"))
def test_linear(format: str, start: str) -> None:
    source = lnn.QuantLinear.from_quant_tensor(random_weight(parse(format), N, K), torch.randn(N))
    layer = nn.Sequential(lnn.QuantLinear(K, N, format=format, device=start))
    layer.to_empty(device="cpu")
    assert layer[0].layout == source.layout
    layer[0].load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("format", FORMATS)
def test_embedding(format: str) -> None:
    source = lnn.QuantEmbedding.from_quant_tensor(random_weight(parse(format), N, K))
    layer = nn.Sequential(lnn.QuantEmbedding(N, K, format=format, device="meta"))
    layer.to_empty(device="cpu")
    layer[0].load_state_dict(source.state_dict())
    ids = torch.arange(N)
    assert torch.equal(layer(ids), source(ids))


def test_a_layer_that_goes_to_meta_and_back() -> None:
    layer = lnn.QuantLinear.from_quant_tensor(random_weight(parse("int3_g64_o4"), N, K))
    state = layer.state_dict()
    layer.to("meta")
    assert all(t.is_meta for t in layer.buffers())
    layer.to_empty(device="cpu")
    layer.quant_tensor().validate()
    layer.load_state_dict(state)
