"""Random models of transformers as GGUF files, converted as llama.cpp's convert_hf_to_gguf.py converts them.

The converter sees the tensors that `save_pretrained` writes; what it does to them is written out here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GGMLType
from safetensors.numpy import load_file
from transformers.pytorch_utils import Conv1D

from gguf_files import write

# Matrices by their names in the file; others are F32.
KINDS = {
    "token_embd": GGMLType.Q8_0, "output": GGMLType.Q8_0, "attn_q": GGMLType.Q4_0, "attn_k": GGMLType.Q5_0,
    "attn_v": GGMLType.Q4_1, "attn_qkv": GGMLType.Q5_1, "attn_output": GGMLType.Q8_0, "ffn_gate": GGMLType.Q4_1,
    "ffn_up": GGMLType.Q4_0, "ffn_down": GGMLType.Q5_1, "ffn_gate_exps": GGMLType.Q4_0, "ffn_up_exps": GGMLType.Q4_0,
    "ffn_down_exps": GGMLType.Q5_1, "ffn_gate_shexp": GGMLType.Q4_1, "ffn_up_shexp": GGMLType.Q4_1,
    "ffn_down_shexp": GGMLType.Q8_0,
}  # fmt: skip
Arrays = dict[str, np.ndarray]


def plain(arrays: Arrays, config: Any) -> Arrays:
    return arrays


def permuted(arrays: Arrays, config: Any) -> Arrays:
    """LlamaModel.permute: in each head of q and k the two halves are interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    done = {}
    for name, a in arrays.items():
        count = heads.get(name.split(".")[-2])
        if count is not None:
            halves = a.reshape(count, 2, a.shape[0] // count // 2, *a.shape[1:])
            a = halves.swapaxes(1, 2).reshape(a.shape)
        done[name] = a
    return done


def ungrouped(arrays: Arrays, config: Any) -> Arrays:
    """FalconModel: all queries, all keys, all values."""
    heads, kv = config.num_attention_heads, config.num_kv_heads
    kv, dim, done = kv or 1, config.hidden_size // heads, {}
    for name, a in arrays.items():
        if "query_key_value" in name:
            groups = a.reshape(kv, heads // kv + 2, dim, -1)
            parts = groups[:, :-2], groups[:, [-2]], groups[:, [-1]]
            a = np.concatenate([p.reshape(-1, a.shape[-1]) for p in parts])
        done[name] = a
    return done


def transposed(arrays: Arrays, config: Any) -> Arrays:
    """GPT2Model."""
    names = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {n: a.T if n.endswith(names) else a for n, a in arrays.items()}


@dataclass(frozen=True)
class Case:
    """A model of transformers, what the converter does to its tensors, and the metadata that it writes."""

    arch: str
    model: str
    config: dict[str, Any]
    fields: dict[str, Any]
    convert: Callable[[Arrays, Any], Arrays] = plain
    arguments: dict[str, Any] = field(default_factory=dict)
    reads: bool = False  # whether transformers' own reader of GGUF makes the same model

    @property
    def encoder(self) -> bool:
        return "Bert" in self.model


SIZES = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FIELDS = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e4, "rope.dimension_count": 16,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rms_norm_eps": 1e-5}
ROTATED = {
    "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5},
    "rms_norm_eps": 1e-5,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_FALCON = {
    **{k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")},
    "ffn_hidden_size": 96, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
_FALCON_FIELDS = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5, "tensor_data_layout": "jploski",
}  # fmt: skip
_BERT = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"layer_norm_eps": 1e-12}
_BERT_FIELDS = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-12, "attention.causal": False,
    "pooling_type": 1,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.25, "attention_multiplier": 0.0625,
    "logits_scaling": 4.0,
}  # fmt: skip
GRANITE_FIELDS = {
    "embedding_scale": 12.0, "residual_scale": 0.25, "attention.scale": 0.0625, "logit_scale": 4.0,
    "vocab_size": 90,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 90, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CASES = {
    "smollm3": Case(
        "smollm3", "SmolLM3ForCausalLM", {**SIZES, **ROPE, "num_hidden_layers": 5},
        {**FIELDS, "block_count": 5, "vocab_size": 90}, permuted,
    ),
    "smollm3 with biases": Case(
        "smollm3", "SmolLM3ForCausalLM", {**SIZES, **ROPE, **_BIASES, "tie_word_embeddings": False},
        FIELDS, permuted,
    ),
    "granite": Case(
        "granite", "GraniteForCausalLM", {**SIZES, **ROPE, **GRANITE, "tie_word_embeddings": True},
        {**FIELDS, **GRANITE_FIELDS}, permuted,
    ),
    "granite, nothing scaled but logits": Case(
        "granite", "GraniteForCausalLM",
        {**SIZES, **ROPE, **_BIASES, "attention_multiplier": 16**-0.5, "logits_scaling": 2.0},
        {**FIELDS, "logit_scale": 2.0}, permuted,
    ),
    "olmo2": Case("olmo2", "Olmo2ForCausalLM", {**SIZES, **ROPE}, FIELDS),
    # Neither permutes heads: these models rotate pairs of neighbours themselves.
    "glm4": Case(
        "glm4", "Glm4ForCausalLM",
        {**SIZES, "head_dim": 32, "attention_bias": False, **ROTATED, "tie_word_embeddings": False},
        {**FIELDS, "attention.key_length": 32, "attention.value_length": 32},
    ),
    "chatglm": Case(
        "chatglm", "GlmForCausalLM", {**SIZES, "head_dim": 16, "attention_bias": True, **ROTATED},
        {**FIELDS, "rope.dimension_count": 8},
    ),
    "falcon 7b": Case(
        "falcon", "FalconForCausalLM", {**_FALCON, "num_kv_heads": 1, "ffn_hidden_size": 256},
        {**_FALCON_FIELDS, "attention.head_count_kv": 1, "feed_forward_length": 256}, ungrouped, reads=True,
    ),
    "falcon 40b": Case(
        "falcon", "FalconForCausalLM",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "tie_word_embeddings": False},
        {**_FALCON_FIELDS, "attention.head_count_kv": 2}, ungrouped,
    ),
    "falcon 11b": Case(
        "falcon", "FalconForCausalLM",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {**_FALCON_FIELDS, "attention.head_count_kv": 2}, ungrouped,
    ),
    "gpt2": Case(
        "gpt2", "GPT2LMHeadModel", {**_GPT2, "n_positions": 1024},
        {
            "block_count": 2, "context_length": 1024, "embedding_length": 64, "feed_forward_length": 256,
            "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
        }, transposed, reads=True,
    ),
    "gpt2 with another mlp and head": Case(
        "gpt2", "GPT2LMHeadModel", {**_GPT2, "n_inner": 96, "tie_word_embeddings": False},
        {
            "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
            "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
        }, transposed,
    ),
    "bert": Case(
        "bert", "BertModel", _BERT, _BERT_FIELDS, arguments={"add_pooling_layer": False},
    ),
    "nomic-bert": Case(
        "nomic-bert", "NomicBertModel",
        {**_BERT, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        {**_BERT_FIELDS, "rope.freq_base": 1000.0},
    ),
}  # fmt: skip


def fuse(tensors: dict[str, Any]) -> dict[str, Any]:
    """As --fuse-qkv and --fuse-gate-up-exps: q, k and v in one tensor, and of experts gates and what they multiply."""
    done = dict(tensors)
    for joined, parts in (
        ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
        ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")),
    ):
        for first in [n for n in tensors if f".{parts[0]}." in n]:
            every = [done.pop(first.replace(parts[0], part)) for part in parts]
            axis = int("exps" in joined)  # the first is of experts
            rows = np.concatenate([a for a, _ in every], axis=axis)
            done[first.replace(parts[0], joined)] = (rows, every[0][1])
    return done


def make(
    case: Case,
    folder: Path,
    kinds: dict[str, GGMLType] = KINDS,
    more: Any = None,
    fused: bool = False,
    **fields: Any,
) -> tuple[Path, Any]:
    """A file, and the model of transformers with its values; `more` tensors take the place of its own (None: left
    out), as do fields; its own may be `fused`.
    """
    torch.manual_seed(0)
    kind = getattr(transformers, case.model)
    model = kind(kind.config_class(**case.config), **case.arguments).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, float(name.endswith("weight")), 0.2)
        else:
            torch.nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    model.save_pretrained(folder / "source")
    arrays = case.convert(load_file(folder / "source" / "model.safetensors"), model.config)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, a in arrays.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        assert re.match(r"blk\.|token|output|position", stored), name
        is_matrix = a.ndim > 1 and stored.endswith("weight")
        kind = kinds.get(stored.split(".")[-2]) if is_matrix else None
        tensors[stored] = (gguf.quantize(a, kind), kind) if kind else (a, None)
    _round(model, case, names, kinds)
    tensors = fuse(tensors) if fused else tensors
    tensors = {n: t for n, t in {**tensors, **(more or {})}.items() if t is not None}
    own = {f"{case.arch}.{k}": v for k, v in case.fields.items()} | {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(model.config.vocab_size)],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }
    kept = {k: v for k, v in {**own, **fields}.items() if v is not None}
    return write(folder / "a.gguf", tensors, arch=case.arch, **kept), model


@torch.no_grad()
def _round(model: Any, case: Case, names: Any, kinds: dict[str, GGMLType]) -> None:
    """Gives the model the values that the blocks of its rows stand for."""
    own = {
        "q_proj": "attn_qkv",
        "k_proj": "attn_qkv",
        "v_proj": "attn_qkv",
        "o_proj": "attn_output",
    }
    own |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    own |= {"router": "ffn_gate_inp", "input_linear": "ffn_gate_shexp", "gate_up_proj": "ffn_up"}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            for part, stored in (("gate_up", "gate"), ("down", "down")):
                weight = getattr(module, f"{part}_proj")
                rows = weight.transpose(1, 2) if module.is_transposed else weight
                kind = kinds[f"ffn_{stored}_exps"]
                if kind is None:
                    continue
                values = gguf.dequantize(gguf.quantize(rows.contiguous().numpy(), kind), kind)
                rows.copy_(torch.from_numpy(values))
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        stored = names.get_name(name) or own.get(name.rpartition(".")[2], "token_embd")
        kind = kinds.get(stored.split(".")[-1])
        if "token_type" in name or kind is None:
            continue
        rows = weight.t() if isinstance(module, Conv1D) else weight
        values = torch.from_numpy(gguf.dequantize(gguf.quantize(rows.numpy(), kind), kind))
        weight.copy_(values.t() if isinstance(module, Conv1D) else values)
