"""Convolutions under FSDP2 and torch.distributed.checkpoint: those of the whole model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import torch.distributed.checkpoint as dcp
from ranks import Context, failures_of, near, raises
from torch.distributed.tensor import DTensor

import lowbit
from lowbit.integrations.fsdp import shardable


def check_fsdp_of_convolutions(c: Context) -> None:
    """In groups, transposed, padded by themselves, and with outliers; loaded whole and sharded."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def make(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=2, bias=False),
        ).eval()  # fmt: skip
        lowbit.quantize_model(made, {"0": "int4_g32_o2", ".*": "nf4_g32"}, skip=(), progress=False)
        return made

    def sharded(m: nn.Sequential) -> nn.Sequential:
        return fully_shard(shardable(m))

    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    whole, parts = make(), sharded(make())
    assert torch.equal(parts(x), whole(x))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for m, own in zip((whole, parts), inputs, strict=True):
        m(own).square().mean().backward()
    assert near(inputs[1].grad, inputs[0].grad)
    state = get_model_state_dict(parts)
    assert isinstance(state["0.codes"], DTensor)
    dcp.save(state, checkpoint_id=f"{c.folder}/convolutions")
    for target in (make(1), sharded(make(2))):
        assert not torch.equal(target(x), whole(x))
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=f"{c.folder}/convolutions")
        set_model_state_dict(target, state)
        assert torch.equal(target(x), whole(x))
    raises(NotImplementedError, "bytes of a parameter", lambda: parts[0].quant_tensor())


def test_on_ranks(tmp_path: Path) -> None:
    failures = failures_of(tmp_path, {"convolutions": check_fsdp_of_convolutions})
    assert not any(failures), failures
