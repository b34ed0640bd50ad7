"""quantize_file: the same weights as quantizing the model in memory, sharded or not, and what it
refuses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.formats import FORMATS
from lowbit.io.save_load import load, load_tensors
from lowbit.methods import quantize
from lowbit.ptq import quantize_model
from lowbit.ptq.file import quantize_file

# The file holds a convolution, integers and FP8, which stay as they are.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the weights stay dense")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(20, 16),
        "model.layers.0.mlp.up.weight": torch.randn(24, 16, dtype=torch.bfloat16),
        "model.layers.0.mlp.up.bias": torch.randn(24),
        "model.layers.0.mlp.down.weight": torch.randn(16, 24).half(),
        "model.layers.0.input_norm.weight": torch.randn(16),
        "model.layers.0.conv.weight": torch.randn(3, 4, 5),
        "model.layers.0.ids.weight": torch.arange(6).view(2, 3),
        "model.layers.0.fp8.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "model.scale": torch.randn(4, 4),
        "lm_head.weight": torch.randn(20, 16),
        "step": torch.tensor(7),
    }


def dense_file(path: Path) -> Path:
    save_file(tensors(), path, {"format": "pt", "note": "kept"})
    return path


def test_what_nobody_asked_to_leave_is_said(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"% of the weights stay dense.*layers\.0\.conv\.weight"):
        report = quantize_file(
            dense_file(tmp_path / "a.safetensors"),
            tmp_path / "b.safetensors",
            "nf4",
            progress=False,
        )
    sizes = {name: t.numel() for name, t in tensors().items() if t.dim() > 1}
    packed = sum(row.shape[0] * row.shape[1] for row in report.layers)
    assert report.packed_share == packed / sum(sizes.values())


def test_a_file(tmp_path: Path):
    src, dst = dense_file(tmp_path / "a.safetensors"), tmp_path / "new" / "b.safetensors"
    report = quantize_file(src, dst, "nf4", progress=False)
    layers = ["model.layers.0.mlp.down", "model.layers.0.mlp.up"]
    assert sorted(row.name for row in report.layers) == layers
    assert report.left == {
        "lm_head.weight": "skipped",
        "model.embed_tokens.weight": "skipped",
        "model.layers.0.conv.weight": "not a matrix named *.weight",
        "model.layers.0.fp8.weight": "float8_e4m3fn, not fp32, fp16 or bf16",
        "model.layers.0.ids.weight": "int64, not fp32, fp16 or bf16",
        "model.scale": "not a matrix named *.weight",
    }
    read, given = load_tensors(dst), tensors()
    for name in layers:
        weight = given.pop(f"{name}.weight")
        expected = quantize(weight, "nf4")
        got = read.pop(name)
        assert all(torch.equal(t, expected.tensors[key]) for key, t in got.tensors.items())
        row = next(row for row in report.layers if row.name == name)
        error = (expected.dequantize() - weight.float()).double()
        assert row.max_error == error.abs().max()
        assert (row.nbytes, row.dense_nbytes) == (expected.nbytes, weight.numel() * 2)
    assert read.keys() == given.keys()
    for name, t in given.items():
        assert read[name].dtype == t.dtype
        assert torch.equal(read[name].float(), t.float())


def test_recipe_and_skip(tmp_path: Path):
    src, dst = dense_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    recipe = {"embed_tokens": "int8_g16", "up": FORMATS["kmeans3"], "down": None}
    report = quantize_file(src, dst, recipe, skip=("lm_head",), progress=False)
    assert {row.name: row.format for row in report.layers} == {
        "model.embed_tokens": "int8_g16",
        "model.layers.0.mlp.up": "kmeans3",
    }
    assert report.left["model.layers.0.mlp.down.weight"] == "not in the recipe"


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("shards", ["20KB", "1GB"], ids=["sharded", "single"])
def test_a_folder_of_transformers(shards: str, tmp_path: Path):
    """The folder gives, in a fresh model, what quantizing the model in memory gives."""
    dense = llama()
    dense.save_pretrained(tmp_path / "dense", max_shard_size=shards)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "old.bin").write_bytes(b"not needed")
    report = quantize_file(tmp_path / "dense", tmp_path / "small", "int4_g32", progress=False)
    in_memory = quantize_model(dense, "int4_g32", progress=False)
    assert sorted(map(str, report.layers)) == sorted(map(str, in_memory.layers))
    names = {p.name for p in (tmp_path / "small").iterdir()}
    assert names == {p.name for p in (tmp_path / "dense").iterdir()} - {"old.bin"}
    assert ("model.safetensors.index.json" in names) == (shards == "20KB")
    if shards == "20KB":
        index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
        files = {
            name: load_file(tmp_path / "small" / name) for name in set(index["weight_map"].values())
        }
        assert len(files) > 2
        assert all(name in files[file] for name, file in index["weight_map"].items())
        # Besides the empty tensor that keeps transformers without lowbit away from a file.
        stored = [name for file in files.values() for name, t in file.items() if t.numel()]
        assert sorted(stored) == sorted(index["weight_map"])
        size = sum(t.nbytes for file in files.values() for t in file.values())
        assert index["metadata"]["total_size"] == size
    loaded = load(llama(), tmp_path / "small")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old folder"])
def test_a_folder_that_fails_is_as_it_was(old: bool, tmp_path: Path):
    """Whether the last weight cannot be quantized or the caller's check fails."""
    source, target = tmp_path / "dense", tmp_path / "new" / "small"
    llama().save_pretrained(source, max_shard_size="20KB")
    if old:
        target.mkdir(parents=True)
        for name in ("config.json", "model.safetensors.index.json", "note"):
            (target / name).write_text("old")
    before = {p.name: p.read_bytes() for p in target.iterdir()} if old else {}

    def unchanged() -> None:
        assert target.exists() == target.parent.exists() == old
        assert {p.name: p.read_bytes() for p in (target.iterdir() if old else ())} == before

    def fail(folder: Path) -> None:
        assert folder.parent == target
        assert len(load_tensors(folder)) > 2
        (folder / "more").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, target, "int4_g32", progress=False, finish=fail)
    unchanged()
    done = []

    def stop(name: str, weight: torch.Tensor, made: object) -> None:
        done.append(name)
        if len(done) == 14:
            raise RuntimeError("the last layer")

    with pytest.raises(RuntimeError, match="the last layer"):
        quantize_file(source, target, "int4_g32", progress=False, on_layer=stop)
    unchanged()
    seen = []

    def finish(folder: Path) -> None:
        (folder / "more").write_text("new")
        seen.extend(p.name for p in folder.iterdir())

    quantize_file(source, target, "int4_g32", progress=False, finish=finish)
    assert {p.name for p in target.iterdir()} == {*before, *seen}
    assert "more" in seen
    assert "model.safetensors.index.json" in seen


def test_a_file_takes_no_finish(tmp_path: Path):
    src, dst = dense_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    with pytest.raises(ValueError, match="finish is for folders"):
        quantize_file(src, dst, "int4", progress=False, finish=print)
    assert not dst.exists()


def test_refusals(tmp_path: Path):
    src, dst = dense_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(src, folder / "model.safetensors")
    bad = [
        ((src, src), "dst must not be src"),
        ((src, tmp_path / "b"), "dst must end in .safetensors because src is a file"),
        ((folder, src), "dst must be a folder because src is one"),
        ((folder, tmp_path / "x" / ".." / "folder"), "dst must not be src"),
    ]
    for (a, b), message in bad:
        with pytest.raises(ValueError, match=message):
            quantize_file(a, b, "int4", progress=False)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        quantize_file(tmp_path / "nothing", dst, "int4", progress=False)
    with pytest.raises(ValueError, match="unknown format 'int7'"):
        quantize_file(src, dst, "int7", progress=False)
    quantize_file(src, dst, "int4", progress=False)
    with pytest.raises(ValueError, match=r"b\.safetensors: is a lowbit checkpoint already"):
        quantize_file(dst, tmp_path / "c.safetensors", "int4", progress=False)
    src.write_bytes(src.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable safetensors file"):
        quantize_file(src, dst, "int4", progress=False)


def test_a_weight_that_cannot_be_quantized_leaves_no_file(tmp_path: Path):
    damaged = tensors()
    damaged["model.layers.0.mlp.up.weight"][3, 5] = torch.inf
    save_file(damaged, tmp_path / "a.safetensors")
    message = r"a\.safetensors: model\.layers\.0\.mlp\.up: weight\[3, 5\] = inf is not finite"
    with pytest.raises(ValueError, match=message):
        quantize_file(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int4", progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
