"""load_model: one entry for every kind of file and folder, whatever the model calls its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import VOCAB, check_model, tiny, transformers, write_folder
from safetensors.torch import load_file, save_file
from test_compressed_tensors import grouped, integers
from test_gptq_folders import packer, settings
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.integrations.load import load_as_stored, load_decoded
from lowbit.nn import QuantEmbedding, QuantLinear

pytest.importorskip("gguf")

from gguf_files import write_llama


def packed(model: nn.Module) -> int:
    return sum(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("format", [None, "int8_g32"])
def test_a_dense_folder(tmp_path: Path, format: str | None) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = lowbit.load_model(tmp_path, format=format, dtype=torch.bfloat16)
    assert (packed(loaded), loaded.lm_head.weight.dtype) == (7 * (format is not None), torch.bfloat16)  # fmt: skip
    if format is None:
        check_model(tmp_path, model)


@pytest.mark.parametrize("format", [None, "int8_g32"])
def test_a_gguf_file(tmp_path: Path, caplog, format: str | None) -> None:
    path = write_llama(tmp_path / "a.gguf")
    with caplog.at_level("INFO", "lowbit"):
        loaded = lowbit.load_model(path, format=format, dtype=torch.float32)
    ours = loaded.model.layers[0].mlp.up_proj
    assert (ours.format.name == "int8_g32") == (format is not None)
    assert caplog.messages[-1].startswith(f"{path}: gguf; ")
    assert ("0 layers requantized" in caplog.messages[-1]) == (format is None)


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_embedding(tmp_path: Path, kind: str, tied: bool) -> None:
    """A tied head shares its packed weight; Gemma scales the rows, not the head."""
    model = tiny(kind, tied, head_dim=16)
    write_folder(tmp_path, grouped(4, targets=["Linear", "Embedding"]), integers(4, 32), model=model)  # fmt: skip
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    tensors, decoded = integers(4, 32)("embed", model.model.embed_tokens.weight.detach())
    del state["model.embed_tokens.weight"]
    state |= {f"model.embed_tokens.{part}": t.contiguous() for part, t in tensors.items()}
    save_file(state, file)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(decoded)
    loaded = check_model(tmp_path, model)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding)
    assert isinstance(loaded.lm_head, QuantLinear) == tied
    if tied:
        assert loaded.lm_head.shares_weight(loaded.model.embed_tokens)


def test_transposed_linears(tmp_path: Path) -> None:
    """GPT-2's Conv1D, which those who quantize take for a linear; dense it is one again."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, n_positions=64
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {k: t for k, t in load_file(file).items() if k != "lm_head.weight"}
    pack = packer(4, 32)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            tensors, decoded = pack(name, module.weight.detach().t().contiguous())
            stored = next(key for key in state if f"{name}.weight".endswith(key))
            del state[stored]
            prefix = stored.removesuffix("weight")
            state |= {prefix + part: t.contiguous() for part, t in tensors.items()}
            with torch.no_grad():
                module.weight.copy_(decoded.t())
    save_file(state, file)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": settings(4, 32)}))  # fmt: skip
    assert packed(check_model(tmp_path, model)) == 4
    dense = load_decoded(tmp_path)
    assert type(dense.transformer.h[0].mlp.c_fc) is Conv1D
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, model(ids).logits)


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    model = write_folder(tmp_path, settings(4, 32), packer(4, 32))
    file = tmp_path / "model.safetensors"
    save_file({k.removeprefix("model."): t for k, t in load_file(file).items()}, file)
    assert packed(check_model(tmp_path, model)) == 7


def test_tensors_that_the_model_has_not_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, settings(4, 32), packer(4, 32))
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.extra.k_scale": torch.ones(1)}, file)
    with pytest.warns(UserWarning, match=r"1 tensors are no part of .*: model\.extra\.k_scale"):
        lowbit.load_model(tmp_path)


def test_what_is_missing_or_elsewhere_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, settings(4, 32), packer(4, 32), model=tiny("Qwen2"))
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for name, message in (
        ("model.norm.weight", r"lacks 1 tensors: model\.norm\.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "lacks tensor 'model.layers.0.self_attn.q_proj.b"),
    ):
        save_file({k: t for k, t in state.items() if k != name}, file)
        with pytest.raises(ValueError, match=message):
            lowbit.load_model(tmp_path)
    save_file(state, file)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, error, message in (
        ({"intermediate_size": 32}, ValueError, r"has shape \(.*\), the model's has \("),
        (
            {"num_hidden_layers": 0, "layer_types": []},
            NotImplementedError,
            r"must be an nn.Linear .* it is no module",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=message) as found:
            lowbit.load_model(tmp_path)
        assert str(tmp_path) in str(found.value)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        lowbit.load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="must be a folder of transformers"):
        lowbit.load_model(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"must be a folder with a config\.json and this file"):
        lowbit.load_model(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        lowbit.load_model(tmp_path, dtype=torch.float64)
    tiny().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="another program quantized, this one is dense"):
        load_as_stored(tmp_path / "dense")
