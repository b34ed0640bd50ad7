"""ReorderedLinear is the linear of the weight with its columns in the order of x, in every way a layer is used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.nn import QuantLinear, ReorderedLinear

ORDER = torch.tensor([3, 0, 5, 1, 4, 2, 7, 6])


def layer(bias: bool = True) -> tuple[ReorderedLinear, Tensor]:
    """And its weight in the order of x."""
    weight = lowbit.quantize(torch.randn(6, 8), "int4_g4_fp32")
    made = ReorderedLinear.from_ordered(weight, ORDER, torch.randn(6) if bias else None)
    dense = torch.empty(6, 8)
    dense[:, ORDER] = weight.dequantize()
    return made, dense


def same(made: nn.Module, other: nn.Module) -> bool:
    x = torch.randn(3, 8)
    return torch.equal(made(x), other(x))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 0, 8), (2, 3, 8)])
def test_product_and_gradient(shape: tuple[int, ...]) -> None:
    made, dense = layer()
    x = torch.randn(shape, requires_grad=True)
    y = made(x)
    expected = nn.functional.linear(x, dense, made.bias)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(ours, grad @ dense)


def test_weight_is_in_the_order_of_x() -> None:
    made, dense = layer()
    assert torch.equal(made.weight + 0, dense)
    assert torch.equal(made.quant_tensor().dequantize(), dense[:, ORDER])


def test_copies_and_state_dicts_hold_the_order() -> None:
    made, _ = layer()
    assert same(made, copy.deepcopy(made))
    assert same(made, pickle.loads(pickle.dumps(made)))
    other = ReorderedLinear(8, 6, format="int4_g4_fp32")
    other.load_state_dict(made.state_dict())
    assert same(made, other)
    half = copy.deepcopy(made).half()
    assert half.input_order.dtype == torch.int64
    assert half.bias is not None
    assert half.bias.dtype == torch.float16
    moved = ReorderedLinear(8, 6, format="int4_g4_fp32", device="meta")
    moved.load_state_dict(made.state_dict(), assign=True)
    assert same(made, moved)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (ORDER.int(), r"input_order must be int64 of shape \(8,\), got torch.int32"),
        (ORDER[:7], r"input_order must be int64 of shape \(8,\), got .* of shape \(7,\)"),
        (ORDER.clamp(max=6), "input_order must hold each of 0 .. 7 once"),
    ],
)
def test_what_is_no_order_is_named(order: Tensor, message: str) -> None:
    made, _ = layer()
    with pytest.raises(ValueError, match=message):
        made.set_input_order(order)
    state = {**made.state_dict(), "input_order": order}
    with pytest.raises(RuntimeError, match=message):
        ReorderedLinear(8, 6, format="int4_g4_fp32").load_state_dict(state)


def test_x_of_another_width_is_named() -> None:
    made, _ = layer()
    with pytest.raises(ValueError, match="8"):
        made(torch.randn(2, 9))


def test_it_is_not_fused_with_siblings() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = layer()[0], layer()[0], layer()[0]

    assert lowbit.nn.fuse(Attention()) == 0


def test_a_plain_layer_does_not_take_its_state() -> None:
    made, _ = layer()
    plain = QuantLinear(8, 6, format="int4_g4_fp32")
    with pytest.raises(RuntimeError, match="input_order"):
        plain.load_state_dict(made.state_dict())
