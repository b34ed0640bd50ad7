"""The commands take folders that other programs quantized: info, run and quantize, and each what another one wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import check_layers, tiny, words, write_folder
from test_cli import fail, run, run_json
from test_gptq_folders import packer, settings, shuffled

transformers = pytest.importorskip("transformers")

import lowbit  # noqa: E402
from lowbit.integrations.load import load_decoded  # noqa: E402
from lowbit.nn import QuantLinear, ReorderedLinear  # noqa: E402


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Act-order, a head left dense, and a tokenizer of words."""
    path = tmp_path / "gptq"
    write_folder(path, settings(4, 32), packer(4, 32, index=shuffled))
    words(path)
    return path


def test_info_lists_what_is_stored(capsys, folder: Path) -> None:
    rows = {row["name"]: row for row in run_json(capsys, "info", folder)["tensors"]}
    assert rows["model.layers.0.mlp.up_proj"]["format"] == "uint4_g32_fp16"
    assert rows["model.layers.0.mlp.up_proj"]["shape"] == [96, 64]
    assert rows["lm_head.weight"]["format"] == "float32"
    assert len(rows) == 7 + 5


def test_info_of_a_dense_folder(capsys, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert {row["format"] for row in run_json(capsys, "info", tmp_path)["tensors"]} == {"float32"}


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_run_answers(capsys, folder: Path, kind: str) -> None:
    """In lowbit's decoder and, where that does not know the model, by transformers."""
    if kind != "Llama":
        write_folder(folder, settings(4, 32), packer(4, 32, index=shuffled), model=tiny(kind))
    options = ("--prompt", "w5 w6", "--max-new-tokens", "4", "--dtype", "fp32")
    answer = run_json(capsys, "run", folder, *options)
    model = lowbit.load_model(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6]])
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=ids > 0)[0, 2:]
    assert answer["text"].split() == [f"w{i}" for i in tokens.tolist()]
    assert "not both" in fail(capsys, "run", folder, "--model", folder)


@pytest.mark.parametrize("kind", ["gptq", "lowbit", "dense"])
def test_run_compares_with_the_dense_model(capsys, tmp_path: Path, folder: Path, kind: str) -> None:
    """Of the same values; fp32 differs from its bf16 by rounding only."""
    if kind != "gptq":
        model = lowbit.load_model(folder) if kind == "lowbit" else load_decoded(folder)
        save = lowbit.save if kind == "lowbit" else transformers.PreTrainedModel.save_pretrained
        save(model, tmp_path / "a.safetensors" if kind == "lowbit" else tmp_path / "other")
        if kind == "lowbit":
            (tmp_path / "other").mkdir()
            (tmp_path / "a.safetensors").rename(tmp_path / "other" / "model.safetensors")
            (tmp_path / "other" / "config.json").write_bytes((folder / "config.json").read_bytes())
        for file in folder.glob("tokenizer*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    options = ("--prompt", "w5 w6", "--max-new-tokens", "4", "--dtype", "fp32", "--compare")
    found = run_json(capsys, "run", folder if kind == "gptq" else tmp_path / "other", *options)
    assert found["dense"]["bits_per_weight"] == 16
    assert found["dense"]["new_tokens"] == found["new_tokens"]
    assert 0 < found["kl_divergence"] < 0.07**2
    assert found["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=0.07)


def test_a_quantized_folder_is_not_quantized_unasked(capsys, tmp_path: Path, folder: Path) -> None:
    message = fail(capsys, "quantize", folder, tmp_path / "out", "-f", "nf4")
    assert "is quantized already" in message
    assert "--quantized keep or requantize" in message
    assert not (tmp_path / "out").exists()
    message = fail(capsys, "quantize", folder, tmp_path / "out", "--quantized", "keep", "-f", "nf4")
    assert "--quantized keep quantizes nothing: give it without --format" in message
    message = fail(capsys, "quantize", folder, tmp_path / "out", "-f", "nf4", "--quantized", "x")
    assert "--quantized must be one of" in message


def test_it_is_kept(capsys, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    text = run(capsys, "quantize", folder, out, "--quantized", "keep")
    assert "7 layers packed as stored (7 uint4_g32_fp16)" in text
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lowbit"}
    first, second = lowbit.load_model(folder), lowbit.load_model(out)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert isinstance(second.model.layers[0].mlp.down_proj, ReorderedLinear)
    run_json(capsys, "run", out, "--prompt", "w5", "--max-new-tokens", "2")


def test_it_is_requantized(capsys, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    run(capsys, "quantize", folder, out, "-f", "int8_g32", "--quantized", "requantize")
    layer = lowbit.load_model(out).model.layers[0].mlp.down_proj
    assert type(layer) is QuantLinear
    dense = load_decoded(folder).model.layers[0].mlp.down_proj.weight
    expected = lowbit.quantize(dense.detach(), "int8_g32")
    assert torch.equal(layer.quant_tensor().codes, expected.codes)


def test_dense_weights_of_every_kind_of_folder(tmp_path: Path, folder: Path) -> None:
    lowbit.save(lowbit.load_model(folder), tmp_path / "own" / "model.safetensors")
    (tmp_path / "own" / "config.json").write_bytes((folder / "config.json").read_bytes())
    dense = load_decoded(folder)
    check_layers(folder, dense, torch.float32)
    own = load_decoded(tmp_path / "own")
    for a, b in zip(dense.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    again = lowbit.load_model(tmp_path / "own", format="int8_g32", dtype=torch.bfloat16)
    layer = again.model.layers[0].mlp.down_proj
    assert (type(layer), layer.format.name, layer.dtype) == (
        QuantLinear,
        "int8_g32",
        torch.bfloat16,
    )
