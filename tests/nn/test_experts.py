"""QuantExperts: the product of each expert with its rows, bit for bit that of its layer alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn import QuantExperts, QuantLinear
from lowbit.ops import library
from lowbit.ops.experts import linear_experts

# Groups that do not divide K, odd N, a table of its own for each weight, and a float8.
FORMATS = ["nf4", "int4_g32", "kmeans3_g64", "uint4_g32", "e4m3", "int3_g64_o4", "int8_row_a8"]
E, N, K = 5, 37, 100


def experts_of(format: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantExperts:
    b = torch.randn(E, N, dtype=dtype) if bias else None
    return QuantExperts.from_weights(torch.randn(E, N, K, dtype=dtype), format, bias=b)


def one_by_one(experts: QuantExperts, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What is computed by hand: an empty result, filled by boolean masks."""
    y = x.new_full((len(x), experts.out_features), torch.nan)
    for e in range(len(experts)):
        if bool((ids == e).any()):
            y[ids == e] = experts[e](x[ids == e])
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_bit_for_bit(format: str, bias: bool, dtype: torch.dtype):
    experts = experts_of(format, bias, dtype)
    assert experts.shape == (E, N, K)
    for ids in ([3, 0, 0, 1, 3, 0, 3], [2], [], [4] * 9):
        which = torch.tensor(ids, dtype=torch.int64)
        x = torch.randn(len(ids), K, dtype=dtype)
        y = experts(x, which)
        assert y.dtype == dtype
        assert torch.equal(y, one_by_one(experts, x, which))


def test_identity_gives_the_weights():
    weight = torch.randn(3, N, K)
    experts = QuantExperts.from_weights(weight, "int4_g32")
    for e in range(3):
        y = experts(torch.eye(K), torch.full((K,), e))
        assert torch.equal(y.T, lowbit.dequantize(lowbit.quantize(weight[e], "int4_g32")))


@pytest.mark.parametrize("format", ["nf4", "uint4_g32", "e4m3"])
def test_the_op_is_that_of_the_layers(format: str):
    experts = experts_of(format)
    counts = [2, 0, 3, 0, 1]
    x = torch.randn(6, K)
    plain = experts._plain()
    with torch.no_grad():
        assert torch.equal(
            linear_experts(x, torch.tensor(counts), *plain), experts.grouped(x, counts)
        )
    args = x, torch.tensor(counts), *library.scatter(plain[0]), plain[1]
    torch.library.opcheck(torch.ops.lowbit.linear_experts.default, args)


def test_compiled():
    experts = experts_of("nf4")
    ids = torch.tensor([3, 0, 0, 1, 3])
    x = torch.randn(5, K)
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, ids), experts(x, ids))
        assert torch.equal(compiled(x[:4], ids[1:]), experts(x[:4], ids[1:]))
        with pytest.raises(ValueError, match="counts must add up to 5 rows"):
            compiled(x, ids + 3)


def test_gradients_are_those_of_the_layers():
    experts = experts_of("int4_g32")
    ids = torch.tensor([3, 0, 0, 1, 3, 0])
    x = torch.randn(6, K, requires_grad=True)
    seed = torch.randn(6, N)
    (found,) = torch.autograd.grad(experts(x, ids), x, seed)
    for e in (0, 1, 3):
        rows = ids == e
        (want,) = torch.autograd.grad(experts[e](x[rows]), x, seed[rows])
        assert torch.equal(found[rows], want[rows])


def test_layers_of_any_kind():
    """Dense ones and packed ones, and the hooks of each, which are called for its rows alone."""
    layers = [nn.Linear(K, N), QuantLinear.from_linear(nn.Linear(K, N), "nf4")]
    experts, seen = QuantExperts(layers), []
    layers[1].register_forward_hook(lambda module, args, y: seen.append(len(args[0])))
    x, ids = torch.randn(4, K), torch.tensor([1, 0, 1, 1])
    assert torch.equal(experts(x, ids), one_by_one(experts, x, ids))
    assert seen == [3, 3]
    assert not list(QuantExperts(layers)._plain() or [])


def test_state_dict():
    experts = experts_of("nf4")
    again = QuantExperts.from_weights(torch.zeros(E, N, K), "nf4", bias=torch.zeros(E, N))
    again.load_state_dict(experts.state_dict())
    x, ids = torch.randn(4, K), torch.tensor([1, 0, 4, 1])
    assert torch.equal(again(x, ids), experts(x, ids))
    assert {name.split(".")[0] for name in experts.state_dict()} == set("01234")


@pytest.mark.parametrize(
    ("x", "ids", "error", "message"),
    [
        (torch.zeros(2, K), torch.tensor([0, E]), ValueError, r"in \[0, 5\), got 5"),
        (torch.zeros(2, K), torch.tensor([-1, 0]), ValueError, r"in \[0, 5\), got -1"),
        (
            torch.zeros(2, K),
            torch.tensor([0.0, 1.0]),
            TypeError,
            "int64 or int32, got torch.float32",
        ),
        (torch.zeros(2, K), torch.tensor([0]), ValueError, r"\(S,\), got \(2, 100\) and \(1,\)"),
        (torch.zeros(K), torch.tensor([0]), ValueError, r"x must be \(S, K\)"),
        (torch.zeros(2, K), [0, 1], TypeError, "experts must be a torch.Tensor, got list"),
        (torch.zeros(2, K + 1), torch.tensor([0, 1]), ValueError, "101"),
    ],
)
def test_bad_input(x, ids, error, message: str):
    with pytest.raises(error, match=message):
        experts_of("nf4")(x, ids)


def test_bad_layers():
    with pytest.raises(ValueError, match="one shape, got none"):
        QuantExperts([])
    with pytest.raises(ValueError, match=r"one shape, got \[\(3, 2\), \(4, 2\)\]"):
        QuantExperts([nn.Linear(2, 3), nn.Linear(2, 4)])
    with pytest.raises(ValueError, match=r"\(experts, N, K\), got \(3, 4\)"):
        QuantExperts.from_weights(torch.zeros(3, 4), "nf4")
    with pytest.raises(ValueError, match=r"bias must have shape \(2, 3\), got \(3,\)"):
        QuantExperts.from_weights(torch.randn(2, 3, 4), "nf4", bias=torch.zeros(3))
