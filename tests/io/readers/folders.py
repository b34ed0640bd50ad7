"""Tiny folders of transformers as programs that quantize write them, from a packer of one weight; and checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import lowbit  # noqa: E402
from lowbit.io.readers.registry import open_checkpoint  # noqa: E402
from lowbit.weights.quantized import QuantTensor  # noqa: E402

HIDDEN, MLP, VOCAB = 64, 96, 64
Packer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def tiny(kind: str = "Llama", tied: bool = False, **more: Any) -> Any:
    """A random model in fp32: "Llama", or "Qwen2", which has biases."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **more,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def linears(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> dict[str, nn.Linear]:
    skip = set(skip)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in skip
    }


def write_folder(
    path: Path,
    quantization: dict[str, Any],
    pack: Packer,
    *,
    model: Any = None,
    skip: Iterable[str] = ("lm_head",),
    shards: int = 1,
    dtype: str = "float32",
) -> Any:
    """Writes the folder; returns the dense model, its weights as the packer says that they are decoded."""
    model = tiny() if model is None else model
    state = {
        name: t.detach().clone()
        for name, t in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    for name, module in linears(model, skip).items():
        if f"{name}.weight" not in state:
            continue
        del state[f"{name}.weight"]
        tensors, decoded = pack(name, module.weight.detach())
        state.update((f"{name}.{part}", t.contiguous().clone()) for part, t in tensors.items())
        with torch.no_grad():
            module.weight.copy_(decoded)
    path.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "dtype": dtype, "quantization_config": quantization}
    config["architectures"] = [type(model).__name__]
    (path / "config.json").write_text(json.dumps(config))
    save_state(path, state, shards)
    return model


def save_state(path: Path, state: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[i::shards]}
        save_file(part, path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def words(path: Path) -> None:
    """A tokenizer of words, w0, w1 and so on."""
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def check_layers(
    path: Path, model: Any, dtype: torch.dtype, skip: Iterable[str] = ("lm_head",)
) -> dict[str, QuantTensor]:
    """Every layer is packed and gives, bit for bit, the weight of the dense model in `dtype`."""
    reader = open_checkpoint(path)
    found = {}
    for name, module in linears(model, skip).items():
        weight, order = reader.layer(name), reader.order(name)
        assert isinstance(weight, QuantTensor), reader.loss(name)
        decoded = lowbit.dequantize(weight, dtype)
        if order is not None:
            decoded = decoded[:, torch.argsort(order)]
        assert torch.equal(decoded.float(), module.weight.detach().to(dtype).float()), name
        found[name] = weight
    return found


def check_model(path: Path, model: Any, **options: Any) -> Any:
    """The loaded model gives the logits of the dense one."""
    loaded = lowbit.load_model(path, **options)
    ids = torch.arange(24).reshape(2, 12) % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    return loaded


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, C) as little-endian streams in words (R, ceil(C * bits / 32)) int32, bit by bit."""
    spread = (codes.long().unsqueeze(-1) >> torch.arange(bits)) & 1
    spread = nn.functional.pad(spread.flatten(1), (0, -codes.shape[1] * bits % 32))
    words = (spread.view(codes.shape[0], -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
