"""BitNet folders: both classes of linears, packed and not, against transformers' own packing and formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_layers, check_model, write_folder
from torch import Tensor

from lowbit.io.readers.registry import open_checkpoint

BITNET = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


def packer(kind: str = "bitlinear", packed: bool = True, value: int = 1) -> Any:
    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        trits = torch.randint(-1, 2, weight.shape)
        scale = torch.tensor([7.25], dtype=torch.bfloat16)
        factor = 1 / scale.float() if kind == "bitlinear" else scale.float()
        rows = len(trits) // 4
        stored = (trits * value).to(torch.bfloat16)
        if packed:
            stored = sum(((trits[i * rows : (i + 1) * rows] + 1) << 2 * i) for i in range(4))
            stored = stored.to(torch.uint8)
        return {"weight": stored, "weight_scale": scale}, trits * factor

    return one


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_layers_are_exact(tmp_path: Path, kind: str, packed: bool) -> None:
    model = write_folder(tmp_path, {**BITNET, "linear_class": kind}, packer(kind, packed))
    found = check_layers(tmp_path, model, torch.float32)
    assert {w.format.name for w in found.values()} == {"ternary_row_fp32"}
    check_model(tmp_path, model)


def test_as_transformers_packs() -> None:
    module = pytest.importorskip("transformers.integrations.bitnet")
    trits = torch.randint(-1, 2, (8, 12))
    torch.manual_seed(0)
    tensors, decoded = packer()("", torch.zeros(8, 12))
    trits = (decoded * 7.25).round()
    assert torch.equal(module.pack_weights(trits.clone()), tensors["weight"])


@pytest.mark.parametrize(
    ("change", "pack", "message"),
    [
        (
            {"linear_class": "x"},
            packer(),
            r"linear_class must be one of \('bitlinear', .* got 'x'",
        ),
        ({"quantization_mode": "online"}, packer(), "must be 'offline', got 'online'"),
        ({"use_rms_norm": True}, packer(), "use_rms_norm must be false, got true"),
        ({}, packer(packed=False, value=2), "weight must hold -1, 0 and 1"),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, change: dict[str, Any], pack: Any, message: str
) -> None:
    write_folder(tmp_path, {**BITNET, **change}, pack)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path).layer("model.layers.0.mlp.up_proj")
    assert str(tmp_path) in str(error.value)
