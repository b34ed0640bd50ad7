"""What runs on a GPU must not wait for it: a wait costs more than a small product and breaks the capture of a graph."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import layouts
from lowbit.formats import parse
from lowbit.ops import weights
from lowbit.ops.weights import embedding
from weights import random_weight


class Waits(TorchDispatchMode):
    """Fails where a tensor is looked at by the host, which waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU, whose indices are asserted about."""
    monkeypatch.setattr(weights, "_ASSERTING", ("cpu",))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
@pytest.mark.parametrize("layout", (layouts.CANONICAL, layouts.N16))
@pytest.mark.usefixtures("_asserting")
def test_embedding_does_not_wait(layout: str, dtype: torch.dtype) -> None:
    qt = random_weight(parse("int4_g32"), 70, 64)
    w = layouts.to_operands(qt, layout)
    indices = torch.tensor([[3, 0], [69, 3]], dtype=dtype)
    want = qt.dequantize()[indices.long()]
    with Waits():
        found = weights.call_embedding(indices, w, torch.float32)
        empty = weights.call_embedding(indices[:0], w, torch.float32)
    assert torch.equal(found, want)
    assert empty.shape == (0, 2, 64)


@pytest.mark.parametrize("index", (-1, 70, 2**40))
@pytest.mark.usefixtures("_asserting")
def test_an_index_out_of_range_stops_the_device(index: int) -> None:
    w = layouts.to_kernel(random_weight(parse("int4_g32"), 70, 64), layouts.N16)
    with pytest.raises(RuntimeError, match=r"indices must be in \[0, 70\)"):
        embedding(torch.tensor([3, index]), w)


def test_a_device_without_values_is_not_looked_at() -> None:
    weights._check_range(torch.zeros(3, dtype=torch.int64, device="meta"), 70)
    assert "cuda" in weights._ASSERTING
