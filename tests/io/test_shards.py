"""lowbit.save in several files: every entry reads them back, and nothing is left half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowbit
from lowbit.io.save_load import load_tensors
from lowbit.io.shards import parse_size
from lowbit.nn import QuantEmbedding, QuantLinear


class Model(nn.Module):
    """An embedding with a tied head, layers, and an extra state with a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight
        self.state: Any = None

    def get_extra_state(self) -> Any:
        """A tensor and a number."""
        return self.state

    def set_extra_state(self, state: Any) -> None:
        """As given."""
        self.state = state


def quantized() -> Model:
    torch.manual_seed(0)
    model = Model()
    lowbit.quantize_model(model, "int4_g32", skip=("embed", "head"), progress=False)
    model.embed = QuantEmbedding.from_embedding(model.embed, "int8_g32")
    model.head = QuantLinear.tied_to(model.embed)
    model.state = {"n": 3, "t": torch.arange(500)}
    return model


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        elif isinstance(value, lowbit.QuantTensor):
            assert torch.equal(found[name].dequantize(), value.dequantize()), name
        else:
            assert found[name]["n"] == value["n"]
            assert torch.equal(found[name]["t"], value["t"])


@pytest.mark.parametrize("limit", [1, 3000, 5000, "8KB"])
def test_files_are_read_together(tmp_path: Path, limit: int | str) -> None:
    model = quantized()
    whole = lowbit.save(model, tmp_path / "whole")
    index = lowbit.save(model, tmp_path / "parts", max_shard_size=limit)
    assert index == tmp_path / "parts" / "model.safetensors.index.json"
    files = sorted(index.parent.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert [f.name for f in files] == [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    tensors = [load_file(file) for file in files]
    content = json.loads(index.read_text())
    assert content["weight_map"] == {
        n: f.name for f, t in zip(files, tensors, strict=True) for n in t
    }
    sizes = [sum(t.nbytes for t in part.values()) for part in tensors]
    assert content["metadata"]["total_size"] == sum(sizes)
    for size, part in zip(sizes, tensors, strict=True):
        # More than the limit only for one layer or tensor.
        assert size <= parse_size(limit) or len({n.rpartition(".")[0] for n in part}) == 1
    check(load_tensors(index.parent), load_tensors(whole))
    loaded = lowbit.load(Model(), index.parent)
    x = torch.arange(12)
    assert torch.equal(loaded.embed(x), model.embed(x))
    assert loaded.head.shares_weight(loaded.embed)
    assert torch.equal(loaded.layers[3](loaded.embed(x)), model.layers[3](model.embed(x)))
    assert torch.equal(loaded.state["t"], torch.arange(500))


def test_what_fits_one_file_has_no_index(tmp_path: Path) -> None:
    model = quantized()
    path = lowbit.save(model, tmp_path / "a", max_shard_size="1GB")
    assert [f.name for f in path.parent.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == lowbit.save(model, tmp_path / "b").read_bytes()


def test_saved_twice(tmp_path: Path) -> None:
    """Fewer files over more: the index names those that count."""
    model = quantized()
    lowbit.save(model, tmp_path, max_shard_size=1)
    lowbit.save(model, tmp_path, max_shard_size=5000)
    check(load_tensors(tmp_path), load_tensors(lowbit.save(model, tmp_path / "whole")))


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "5", "GB", "1 XB", "-1GB", "0KB", "٣GB"])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes"):
        lowbit.save(quantized(), tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_sizes() -> None:
    assert [parse_size(s) for s in (7, "5GB", "1.5 kb", "2MiB")] == [7, 5 * 10**9, 1500, 2**21]


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(ValueError, match="path must be a folder with max_shard_size"):
        lowbit.save(model, tmp_path / "a.safetensors", max_shard_size="1KB")
    path = lowbit.save(model, tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"path must hold no other checkpoint, got .*model\.safetensors"
    ):
        lowbit.save(model, tmp_path / "a", max_shard_size="1KB")
    assert list(path.parent.iterdir()) == [path]
    state = {**load_tensors(path), "layers.0.zeros": torch.zeros(4)}
    with pytest.raises(
        ValueError, match=r"'layers\.0\.zeros' would be read as a part of the layer"
    ):
        lowbit.save(state, tmp_path / "b", max_shard_size="1KB")
    assert not (tmp_path / "b").exists()
