"""`set_activations`: layers of a model take x as int8 with the weights that they have, all of them or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn import LLMInt8Linear, QuantEmbedding, QuantLinear, set_activations


def model_of(*formats: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [QuantLinear.from_linear(nn.Linear(96, 96), format) for format in formats]
    return nn.Sequential(*layers)


def test_only_the_activations_change():
    model, x = model_of("int4_g32", "q4_1", "fp4"), torch.randn(4, 96)
    before = [layer.quant_tensor() for layer in model]
    exact = model(x)
    assert set_activations(model, "int8_b32") == 3
    names = ["int4_g32_a8b32", "q4_1_a8b32", "fp4_a8b32"]
    assert [layer.format.name for layer in model] == names
    for layer, old in zip(model, before, strict=True):
        now = layer.quant_tensor()
        assert now.format == old.format.with_activation("int8", 32)
        assert all(torch.equal(now.tensors[name], t) for name, t in old.tensors.items())
        assert torch.equal(layer(x), lowbit.linear(x, now, layer.bias))
    assert not torch.equal(model(x), exact)
    # A step is 1/127 of the largest value of 32, and a code is off by at most half of it.
    assert (model(x) - exact).norm() < 0.02 * exact.norm()
    assert set_activations(model, "int8") == 3
    assert [layer.format.name for layer in model] == ["int4_g32_a8", "q4_1_a8", "fp4_a8"]
    assert set_activations(model, None) == 3
    assert [layer.format.name for layer in model] == ["int4_g32", "q4_1", "fp4"]
    assert torch.equal(model(x), exact)


def test_a_table_is_rounded_only_where_it_must_be():
    model = model_of("int4_g32", "nf4", "kmeans4")
    with pytest.raises(
        ValueError, match=r"^1: format 'nf4_a8b32': its table is not exact in int8.*int8_table"
    ):
        set_activations(model, "int8_b32")
    assert [layer.format.name for layer in model] == ["int4_g32", "nf4", "kmeans4"]
    set_activations(model, "int8_table_b32")
    assert [layer.format.name for layer in model] == [
        "int4_g32_a8b32",
        "nf4_a8tb32",
        "kmeans4_a8tb32",
    ]


def test_which_layers():
    model = nn.ModuleDict(
        {
            "tokens": QuantEmbedding.from_embedding(nn.Embedding(50, 96), "int8_g32"),
            "up": QuantLinear.from_linear(nn.Linear(96, 64), "int4_g32"),
            "mixed": LLMInt8Linear.from_linear(nn.Linear(96, 64)),
            "lm_head": QuantLinear.from_linear(nn.Linear(96, 50), "int8_g32"),
        }
    )
    model["tied"] = QuantLinear.tied_to(model["tokens"])
    assert set_activations(model, "int8_b32", skip=["lm_head", "tied"]) == 1
    assert model["up"].format.name == "int4_g32_a8b32"
    assert model["lm_head"].format.name == model["tokens"].format.name == "int8_g32"
    assert model["mixed"].quantized.format.name == "int8_row_a8"
    # A tied layer changes by itself: the embedding multiplies nothing.
    assert set_activations(model, "int8_b32") == 2
    x = torch.randn(3, 96)
    table = model["tokens"].quant_tensor()
    assert (model["tied"].format.name, table.format.name) == ("int8_g32_a8b32", "int8_g32")
    assert torch.equal(model["tied"](x), lowbit.linear(x, model["tied"].quant_tensor()))
    assert not torch.equal(model["tied"](x), lowbit.linear(x, table))


def test_state_dicts_hold_them():
    model, other = model_of("int4_g32"), model_of("int4_g32")
    set_activations(model, "int8_b32")
    with pytest.raises(RuntimeError, match="format must be"):
        other.load_state_dict(model.state_dict())
    set_activations(other, "int8_b32")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(other(x), model(x))


def test_bad_input():
    with pytest.raises(ValueError, match="activations must be int8 or int8_table.*got 'int8_g32'"):
        set_activations(model_of("int4_g32"), "int8_g32")
    with pytest.raises(ValueError, match="packed layers that are not skipped, got none"):
        set_activations(nn.Linear(3, 3), "int8")
    model = model_of("int4_g32", "int4_g20")
    with pytest.raises(
        ValueError,
        match="^1: format 'int4_g20_a8b32': activation_group must be a multiple",
    ):
        set_activations(model, "int8_b32")
    assert [layer.format.name for layer in model] == ["int4_g32", "int4_g20"]
    model = model_of("int4_g32_a8")
    model[0].set_input_scale(0.1)
    with pytest.raises(ValueError, match="static input scale"):
        set_activations(model, None)
    set_activations(model, "int8_b32")
    x = torch.randn(2, 96)
    plain = model_of("int4_g32_a8")
    plain[0].set_input_scale(0.1)
    assert torch.equal(model(x), plain(x))
