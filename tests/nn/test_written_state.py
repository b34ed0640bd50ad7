"""State dicts of layers whose tensors were written to or replaced, while an older state dict is alive."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.nn import QuantLinear


@pytest.mark.parametrize("how", ("in place", "data", "numpy", "replaced"))
def test_a_state_dict_is_what_the_layer_holds(how: str) -> None:
    """Also while one of before is alive, whose tensors tied layers would share."""
    layer = QuantLinear.from_linear(nn.Linear(64, 100, bias=False), "nf4_g32")
    first = {n: t for n, t in layer.state_dict().items() if n != "_extra_state"}
    assert all(layer.state_dict()[name] is t for name, t in first.items())
    copies = {name: t.clone() for name, t in first.items()}
    if how == "in place":
        layer.scales.mul_(2)
    elif how == "data":
        layer.scales.data.mul_(2)
    elif how == "numpy":
        layer.scales.numpy()[...] *= 2
    else:
        for _ in range(2):  # the second may lie where the first buffer did
            layer.scales = layer.scales * 2**0.5
    second = layer.state_dict()
    assert torch.equal(second["scales"], layer.quant_tensor().scales)
    assert not torch.equal(second["scales"], copies["scales"])
