"""transformers models whose linears stay packed: `load_gguf` makes a LlamaForCausalLM from a GGUF
file.

The module tree is transformers' own, built on the meta device; each `nn.Linear` is replaced by a
`QuantLinear` and the embedding by a `QuantEmbedding` as their tensors are read, so no dense weight
ever exists.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lowbit
from lowbit.formats import Format, as_format
from lowbit.io.gguf import GGUFFile
from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear
from lowbit.tensor import QuantTensor

# llama.cpp's names of the tensors of one layer; the keys are transformers'.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
T = TypeVar("T")
_MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    format: Format | str | None = None,
) -> LlamaForCausalLM:
    """Loads a GGUF file of architecture "llama" with its block-quantized weights packed as stored.

    A tied head shares the embedding's packed tensors. Tensors that the file holds dense (F16, BF16,
    F32) stay dense in `dtype`.

    Args:
        path: the file.
        dtype: of the activations, the norms and the rows that the embedding returns.
        format: requantize the linears of the layers to this format, one by one; the embedding and
            the head stay as stored.

    Raises:
        ValueError: the file is damaged, or a tensor or a key is missing.
        NotImplementedError: the architecture, a tensor type or a feature of the model is not
            supported.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    target = None if format is None else as_format(format)
    file = GGUFFile(path)
    config = llama_config(file)
    config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = _stored_names(model, config)
    if unknown := sorted(
        set(file) - {f"{v}.{leaf}" for v, leaves in names.values() for leaf in leaves}
    ):
        raise NotImplementedError(f"{file.path}: a llama model has no tensors {unknown[:8]}")
    for name, (stored, leaves) in names.items():
        module = model.get_submodule(name)
        tensors = {
            leaf: _read(file, f"{stored}.{leaf}", module.get_parameter(leaf).shape)
            for leaf in leaves
        }
        if name.endswith(("q_proj", "k_proj")):
            tensors = {
                leaf: _unpermute(t, model.model.layers[0].self_attn.head_dim)
                for leaf, t in tensors.items()
            }
        _fill(model, name, tensors, dtype, None if name == "lm_head" else target)
    if config.tie_word_embeddings:
        _tie_head(model)
    # The only buffers of the tree; they do not depend on the tensors.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file carries, with its chat template.

    Raises:
        ValueError: the file is damaged, has no tokenizer, or names a token that does not exist.
    """
    path = Path(path)
    file = GGUFFile(path)
    _key(file, "tokenizer.ggml.model", str)
    tokens = _key(file, "tokenizer.ggml.tokens", list)
    for name in ("bos", "eos", "unknown", "padding"):
        _token(file, name, len(tokens))
    # Not AutoTokenizer: for the class name alone it parses the header once more, which takes seconds.
    return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)


def llama_config(file: GGUFFile) -> LlamaConfig:
    """The transformers configuration of a GGUF file.

    Raises:
        ValueError: a key is missing or out of range.
        NotImplementedError: the architecture is not "llama", or it scales its rotary embedding.
    """
    arch = _key(file, "general.architecture", str)
    if arch != "llama":
        raise NotImplementedError(f"{file.path}: architecture {arch!r}; expected 'llama'")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise NotImplementedError(f"{file.path}: rope scaling {scaling!r}; expected none")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    layers = _key(file, "llama.block_count", int, most=len(file))
    heads = _key(file, "llama.attention.head_count", int)
    kv_heads = _key(file, "llama.attention.head_count_kv", int, default=heads)
    if heads % kv_heads:
        raise ValueError(f"{file.path}: {heads} heads cannot share {kv_heads} key heads evenly")
    vocab = file.tensors["token_embd.weight"].shape[0]
    hidden = _key(file, "llama.embedding_length", int)
    head_dim = _key(file, "llama.attention.key_length", int, default=hidden // heads)
    rotated = _key(file, "llama.rope.dimension_count", int, default=head_dim)
    if rotated != head_dim or head_dim % 2:
        raise NotImplementedError(
            f"{file.path}: {rotated} of {head_dim} dimensions of a head are rotated; "
            "expected all, and an even number"
        )
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_key(file, "llama.feed_forward_length", int),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_key(file, "llama.context_length", int),
        rms_norm_eps=_key(file, "llama.attention.layer_norm_rms_epsilon", float),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _key(file, "llama.rope.freq_base", float, default=10000.0),
        },
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=_token(file, "bos", vocab),
        eos_token_id=_token(file, "eos", vocab),
        pad_token_id=_token(file, "padding", vocab),
    )


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The modules of a model that hold packed weights, a tied head included."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def _key(
    file: GGUFFile, key: str, kind: type[T], default: T | None = None, most: int = 2**31 - 1
) -> T:
    value = file.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{file.path}: metadata key {key!r} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{file.path}: metadata key {key!r} must be {kind.__name__}, got {value!r:.100}"
        )
    if isinstance(value, int | float) and not 0 < value <= most:
        raise ValueError(f"{file.path}: metadata key {key!r} must be in (0, {most}], got {value}")
    return value


def _token(file: GGUFFile, name: str, vocab: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < vocab):
        raise ValueError(f"{file.path}: {key} must be in [0, {vocab}), got {value!r:.100}")
    return value


def _stored_names(
    model: LlamaForCausalLM, config: LlamaConfig
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For every module with parameters of its own: its name in the file, and which parameters."""
    names = dict(_MODEL_NAMES)
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{k}": f"blk.{i}.{v}" for k, v in _LAYER_NAMES.items()}
    if config.tie_word_embeddings:
        del names["lm_head"]
    return {
        name: (stored, tuple(leaf for leaf, _ in model.get_submodule(name).named_parameters()))
        for name, stored in names.items()
    }


def _read(file: GGUFFile, stored: str, shape: torch.Size) -> QuantTensor | Tensor:
    if stored not in file.tensors:
        raise ValueError(f"{file.path}: tensor {stored!r} is missing")
    if file.tensors[stored].shape != tuple(shape):
        raise ValueError(
            f"{file.path}: tensor {stored!r} must have shape {tuple(shape)}, "
            f"got {file.tensors[stored].shape}"
        )
    return file[stored]


def _unpermute(tensor: QuantTensor | Tensor, head_dim: int) -> QuantTensor | Tensor:
    """Undoes llama.cpp's order of a head's rows: the two of a rotated pair are neighbours."""
    order = torch.arange(tensor.shape[0], dtype=torch.int64, device=tensor.device)
    rows = order.view(-1, head_dim // 2, 2).transpose(1, 2).flatten()
    return tensor.map(lambda t: t[rows]) if isinstance(tensor, QuantTensor) else tensor[rows]


def _fill(
    model: nn.Module,
    name: str,
    tensors: dict[str, QuantTensor | Tensor],
    dtype: torch.dtype,
    target: Format | None,
) -> None:
    """Gives the module `name` its tensors, replacing it where they are packed."""
    module = model.get_submodule(name)
    weight, bias = tensors["weight"], tensors.get("bias")
    if isinstance(bias, QuantTensor):
        raise NotImplementedError(f"{name}.bias must be dense, got {bias}")
    if isinstance(module, nn.Linear) and target is not None:
        dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
        weight = lowbit.quantize(dense, target)
        del dense
        _return_freed_memory()
    if not isinstance(weight, QuantTensor):
        module.register_parameter("weight", nn.Parameter(weight.to(dtype)))
        if bias is not None:
            module.register_parameter("bias", nn.Parameter(bias.to(dtype)))
        return
    made: nn.Module
    if isinstance(module, nn.Linear):
        made = QuantLinear.from_quant_tensor(weight, bias, dtype)
    elif isinstance(module, nn.Embedding):
        made = QuantEmbedding.from_quant_tensor(weight, dtype, module.padding_idx)
    else:
        raise NotImplementedError(f"{name}.weight must be dense, got {weight}")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)


def _return_freed_memory() -> None:
    """Gives the system what glibc keeps of the temporaries: 190 MiB after 210 layers of 135M weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _tie_head(model: LlamaForCausalLM) -> None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantEmbedding):
        model.lm_head = QuantLinear.tied_to(embedding)
    else:
        model.lm_head.weight = embedding.weight
