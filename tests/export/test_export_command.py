"""`lowbit export`: files of every kind from a GGUF file and from folders, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_cli import fail, run, run_json

import lowbit
from gguf_files import write_llama
from lowbit.io.readers.gguf import GGUFFile

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_1, Q8_0 and norms, with a tokenizer."""
    return write_llama(tmp_path_factory.mktemp("export") / "tiny.gguf")


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = lowbit.load_model(path, dtype=torch.float32)(IDS).logits
    return found


def test_from_kind_to_kind(file: Path, tmp_path: Path, capsys: Any) -> None:
    """GGUF to GPTQ to compressed-tensors to GGUF: no weight changes after the first."""
    gptq, tensors, last = tmp_path / "gptq", tmp_path / "ct", tmp_path / "last.gguf"
    said = run(capsys, "export", file, gptq, "--to", "gptq", "--requantize", "int4_g32")
    assert f"{gptq}: gptq, 0 layers packed as they are, 14 quantized anew, 1 decoded" in said
    assert "decoded: model.embed_tokens" in said
    run(capsys, "export", gptq, tensors, "--to", "compressed-tensors")
    assert torch.equal(logits(tensors), logits(gptq))
    assert (tensors / "tokenizer.json").is_file()
    done = run_json(capsys, "export", tensors, last, "--to", "gguf", "--pre", "smollm")
    assert done["to"] == "gguf"
    assert done["path"] == str(last)
    assert set(done["packed"].values()) == {"Q4_0"}
    assert done["dense"] == ["model.embed_tokens"]
    assert torch.equal(logits(last), logits(gptq))
    assert GGUFFile(last).metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_gguf_file_keeps_its_bytes(file: Path, tmp_path: Path, capsys: Any) -> None:
    said = run(capsys, "export", file, tmp_path / "b.gguf", "--to", "gguf")
    assert "gguf, 15 layers packed as they are, 0 dense" in said
    ours, theirs = GGUFFile(tmp_path / "b.gguf"), GGUFFile(file)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs:
        a, b = (f._bytes(f.tensors[name], 0, f.tensors[name].nbytes) for f in (ours, theirs))
        assert a == b, name
    assert ours.metadata["tokenizer.ggml.tokens"] == theirs.metadata["tokenizer.ggml.tokens"]


def test_a_folder_of_lowbit(file: Path, tmp_path: Path, capsys: Any) -> None:
    """Without a tokenizer: the file has none, and everything else."""
    dense = lowbit.load_model(file)
    folder = tmp_path / "folder"
    lowbit.save(dense, folder)
    config = {**dense.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    run(capsys, "export", folder, tmp_path / "a.gguf", "--to", "gguf")
    found, source = GGUFFile(tmp_path / "a.gguf"), GGUFFile(file)
    for name in source:
        if source.tensors[name].type.name.startswith("Q"):
            weight = source[name]
            assert torch.equal(found[name].dequantize(), weight.dequantize()), name
    assert "tokenizer.ggml.model" not in found.metadata


def test_bad_input(file: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    said = fail(capsys, "export", file, out, "--to", "exl2")
    assert "--to must be one of gguf, gptq, compressed-tensors, c, got 'exl2'" in said
    assert "--pre is for --to gguf" in fail(
        capsys, "export", file, out, "--to", "gptq", "--pre", "x"
    )
    said = fail(capsys, "export", file, out, "--to", "gptq")
    assert (
        "model.layers.0.self_attn.q_proj: format 'q4_1' of a weight (96, 96) is none of integers"
        in said
    )
    assert "--requantize FORMAT" in said
    said = fail(capsys, "export", file, out, "--to", "gguf", "--requantize", "x")
    assert "requantize must be one of" in said
    assert "no file or folder" in fail(capsys, "export", tmp_path / "none", out, "--to", "gptq")
    assert not list(tmp_path.iterdir())
