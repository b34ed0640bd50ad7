"""JoinedLinear: the results of its halves, and the linear that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.export.layers import packed_layers
from lowbit.nn import JoinedLinear, QuantLinear
from lowbit.nn.stand_ins import stand_ins


class Net(nn.Module):
    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(48, rows)
        self.again = self.up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return gate.sigmoid() * up


def joined() -> Net:
    net = Net()
    with stand_ins(net, apart=("up",)):
        half = net.get_submodule("up.0")
        made = QuantLinear.from_quant_tensor(lowbit.quantize(half.weight, "nf4_g16"), half.bias)
        net.up[0] = made
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_results_of_both(dtype: torch.dtype) -> None:
    linears = [nn.Linear(48, n).to(dtype) for n in (20, 7)]
    layers = [
        QuantLinear.from_linear(m, f) for m, f in zip(linears, ("nf4_g16", "int8_row"), strict=True)
    ]
    both, x = JoinedLinear(layers), torch.randn(2, 5, 48, dtype=dtype)
    assert torch.equal(both(x), torch.cat([layer(x) for layer in layers], -1))
    assert (both.out_features, both.in_features) == (27, 48)
    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), both(x))


def test_other_layers() -> None:
    for layers in ([], [nn.Linear(3, 4), nn.Linear(4, 4)]):
        with pytest.raises(ValueError, match="layers must have one K, got"):
            JoinedLinear(layers)


def test_what_is_not_changed_is_what_it_was() -> None:
    """With its hooks; rows of an odd number have no halves."""
    for rows in (64, 63):
        net, calls = Net(rows), []
        up, weight, state = net.up, net.up.weight, [*net.state_dict()]
        handle = up.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with stand_ins(net, apart=("up",)) as forms:
            assert isinstance(net.up, JoinedLinear) == (rows == 64)
            assert net.again is net.up
            assert [*forms] == (["up.0", "up.1", "again.0", "again.1"] if rows == 64 else [])
            net.up(torch.randn(2, 48))
        assert net.up is up is net.again
        assert net.up.weight is weight
        assert [*net.state_dict()] == state
        assert len(calls) == 1
        handle.remove()
        assert not net.up._forward_hooks


def test_weights_that_were_set_stay() -> None:
    net = Net()
    halves = torch.randn(2, 32, 48)
    with stand_ins(net, apart=("up",)):
        for half, weight in zip(net.up, halves, strict=True):
            half.weight = nn.Parameter(weight)
    assert torch.equal(net.up.weight, halves.flatten(0, 1))
    assert net.up.weight.requires_grad


def test_packed_beside_dense(tmp_path: Path) -> None:
    """The dense half has memory of its own, saved, loaded and dense again."""
    net, x = joined(), torch.randn(3, 48)
    assert type(net.up[1]) is nn.Linear
    assert net.up[1].weight.untyped_storage().nbytes() == 32 * 48 * 4
    lowbit.save(net, tmp_path)
    other = Net()
    calls: list[int] = []
    other.up.register_forward_hook(lambda *_: calls.append(1))
    lowbit.load(other, tmp_path)
    assert torch.equal(other(x), net(x))
    assert other.again is other.up
    assert calls == [1]
    weight = torch.cat([other.up[0].quant_tensor().dequantize(), other.up[1].weight])
    lowbit.dequantize_model(other)
    assert type(other.up) is nn.Linear
    assert other.again is other.up
    assert torch.equal(other.up.weight, weight)
    torch.testing.assert_close(other(x), net(x))
    assert calls == [1, 1]


def test_other_programs_have_no_such_layer() -> None:
    with pytest.raises(NotImplementedError, match="up is a JoinedLinear, whose halves are one"):
        packed_layers(joined())


def test_it_is_not_spread_over_processes() -> None:
    plans = pytest.importorskip("lowbit.integrations.plans")
    with pytest.raises(NotImplementedError, match="a JoinedLinear cannot be split by the style"):
        plans._split(joined(), "up", joined().up, "colwise", None)
