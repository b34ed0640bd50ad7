"""`lowbit quantize` of a GGUF file: kept as stored, quantized anew, calibrated; what it writes is read by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf import GGMLQuantizationType as GGMLType
from gguf_converted import KINDS, make
from gguf_moe import MOE
from test_cli import fail, run, run_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from gguf_files import Llama, llama_fields, llama_tensors, write, write_llama
from lowbit.integrations.load import load_decoded, load_tokenizer
from lowbit.nn import QuantEmbedding, QuantLinear

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(20)[None]
DENSE = Llama(kind=GGMLType.F16, embedding_kind=GGMLType.F16)
FACTORS = np.array([1] * 10 + [2.5, 5] + [8] * 4, np.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_kept(tmp_path: Path, capsys: Any) -> None:
    """Bit for bit what the file computes, with its tokenizer and with factors of its frequencies."""
    spec = Llama()
    tensors = {**llama_tensors(spec), "rope_freqs.weight": (FACTORS, None)}
    file, out = write(tmp_path / "a.gguf", tensors, **llama_fields(spec)), tmp_path / "out"
    text = run(capsys, "quantize", file, out, "--quantized", "keep")
    assert "packed as stored" in text
    assert "% of" in text
    found, expected = lowbit.load_model(out), lowbit.load_model(file)
    assert torch.equal(logits(found), logits(expected))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))
    assert AutoTokenizer.from_pretrained(out)("that\n") == load_tokenizer(file)("that\n")
    assert found.generation_config.eos_token_id == 2
    assert run_json(capsys, "info", out)


def test_quantized_anew(tmp_path: Path, capsys: Any) -> None:
    """Linears from the values of the file, not from these in bf16; embedding and head as stored."""
    file, out = write_llama(tmp_path / "a.gguf"), tmp_path / "out"
    done = run_json(capsys, "quantize", file, out, "-f", "nf4", "--quantized", "requantize")
    assert "stays packed as stored, q8_0" in done["left"]["model.embed_tokens"]
    found, expected = lowbit.load_model(out), lowbit.load_model(file, format="nf4")
    assert torch.equal(logits(found), logits(expected))
    assert isinstance(found.get_input_embeddings(), QuantEmbedding)
    head = found.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert head.format.name == "q8_0"
    assert found.dtype == torch.bfloat16


def test_halves_of_two_types_stay_as_stored(tmp_path: Path, capsys: Any) -> None:
    """What is skipped: of a linear, and of experts."""
    kinds = {**KINDS, "ffn_up_shexp": GGMLType.Q8_0, "ffn_up_exps": GGMLType.Q8_0}
    file, _ = make(MOE["granitemoe with a shared expert"], tmp_path, kinds)
    out = tmp_path / "out"
    skipped = ("--skip", "shared_mlp", "--skip", "experts")
    run(capsys, "quantize", file, out, "-f", "nf4", "--quantized", "requantize", *skipped)
    found, stored = lowbit.load_model(out), lowbit.load_model(file)
    name = "model.layers.0.shared_mlp.input_linear"
    assert [half.format.name for half in found.get_submodule(name)] == ["q4_1", "q8_0"]
    for i in range(2):
        weights = [m.get_submodule(f"{name}.{i}").quant_tensor() for m in (found, stored)]
        assert torch.equal(*(weight.dequantize() for weight in weights))
    assert found.model.layers[0].self_attn.q_proj.format.name == "nf4"
    experts = found.model.layers[0].block_sparse_moe.experts
    halves = [experts.gate_proj, experts.up_proj, experts.down_proj]
    assert [{m.format.name for m in half} for half in halves] == [{"q4_0"}, {"q8_0"}, {"q5_1"}]


def test_a_dense_file(tmp_path: Path, capsys: Any) -> None:
    file, out = write_llama(tmp_path / "a.gguf", DENSE), tmp_path / "out"
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(64)[None] % 50)
    options = ("--method", "gptq", "--calibrate", tokens, "--length", 32)
    run(capsys, "quantize", file, out, "-f", "int4_g32", *options, "--dtype", "fp32")
    found = lowbit.load_model(out)
    plain = lowbit.load_model(file, format="int4_g32", dtype=torch.float32)
    dense = logits(load_decoded(file, torch.float32))
    assert found.dtype == torch.float32
    assert not torch.equal(logits(found), logits(plain))
    assert (logits(found) - dense).norm() < 0.2 * dense.norm()


def test_bad_input(tmp_path: Path, capsys: Any) -> None:
    file, out = write_llama(tmp_path / "a.gguf"), tmp_path / "out"
    dense = write_llama(tmp_path / "dense.gguf", DENSE)
    (tmp_path / "damaged.gguf").write_bytes(file.read_bytes()[:1000])
    for arguments, message in (
        ((file, out, "-f", "nf4"), "is quantized already (q4_1, q8_0): let --quantized keep"),
        ((dense, out, "-f", "nf4", "--quantized", "requantize"), "it is dense"),
        ((file, tmp_path / "x.safetensors" / "y", "-f", "nf4", "--quantized", "keep"), "--format"),
        ((tmp_path / "damaged.gguf", out, "--quantized", "keep"), "damaged.gguf"),
        ((tmp_path / "none.gguf", out, "--quantized", "keep"), "none.gguf"),
    ):
        assert message in fail(capsys, "quantize", *arguments), arguments
        assert not out.exists()
