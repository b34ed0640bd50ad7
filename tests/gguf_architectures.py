"""Tiny GGUF files of architectures other than llama, with blocks of several types mixed, and what transformers makes
of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GGMLType
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import random_blocks, write

# Types of the tensors, by name; the scales keep outputs about as large as inputs.
MIXED = {
    "token_embd": GGMLType.Q6_K, "output": GGMLType.Q8_0, "attn_q": GGMLType.Q4_K,
    "attn_k": GGMLType.Q5_0, "attn_v": GGMLType.Q8_0, "attn_output": GGMLType.IQ4_XS,
    "attn_qkv": GGMLType.Q4_K, "ffn_gate": GGMLType.Q4_K, "ffn_up": GGMLType.Q5_0,
    "ffn_down": GGMLType.Q6_K,
}  # fmt: skip
_SCALES = {
    GGMLType.Q4_K: 2e-4, GGMLType.Q6_K: 4e-5, GGMLType.IQ4_XS: 4e-5, GGMLType.Q5_0: 6e-3,
    GGMLType.Q8_0: 8e-4, GGMLType.IQ2_XXS: 3e-3, GGMLType.IQ1_M: 3e-3,
}  # fmt: skip
_MLP = {"ffn_gate": ("mlp", "hidden"), "ffn_up": ("mlp", "hidden"), "ffn_down": ("hidden", "mlp")}
_LINEARS = {
    "attn_q": ("q", "hidden"), "attn_k": ("kv", "hidden"), "attn_v": ("kv", "hidden"),
    "attn_output": ("hidden", "q"), **_MLP,
}  # fmt: skip
_SEQUENTIAL = {n: s for n, s in _LINEARS.items() if n != "ffn_gate"}
_FUSED = {
    "attn_qkv": ("qkv", "hidden"), "attn_output": ("hidden", "q"), "ffn_up": ("two_mlp", "hidden"),
    "ffn_down": ("hidden", "mlp"),
}  # fmt: skip
_LAYERS = {"phi3": _FUSED, "starcoder2": _SEQUENTIAL}
_NORMS = {
    "qwen3": ("attn_q_norm", "attn_k_norm"),
    "gemma2": ("post_attention_norm", "post_ffw_norm"),
    "gemma3": ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
}
LAYER_NORMS = ("stablelm", "starcoder2")  # with a bias


@dataclass(frozen=True)
class Spec:
    """A file; `biases` are the linears that have one, `fields` more metadata, without the name of the architecture."""

    arch: str
    hidden: int = 256
    mlp: int = 256
    vocab: int = 90
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    dim: int = 128
    tied: bool = True
    biases: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    kinds: dict[str, GGMLType | None] = field(default_factory=lambda: MIXED)
    fields: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Spec:
        return replace(self, **changes)


_ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
_GEMMA = {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 5}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Of which transformers' reader makes the right model.
SPECS = {
    "qwen2": Spec("qwen2", biases=_ALL[:3], fields={"rope.freq_base": 1e6}),
    "qwen2 untied": Spec("qwen2", biases=_ALL[:3], tied=False),
    "qwen3": Spec("qwen3", heads=4, kv_heads=2, fields={"attention.key_length": 128, "attention.value_length": 128}),
    "gemma2": Spec("gemma2", dim=256, layers=3, fields={**_GEMMA, **_CAPS}),
    "gemma3": Spec("gemma3", dim=256, layers=6, fields={**_GEMMA, "rope.freq_base": 1e6}),
    "phi3": Spec("phi3", tied=False, fields={"rope.dimension_count": 128}),
    "starcoder2": Spec("starcoder2", biases=_ALL),
    "stablelm": Spec("stablelm", tied=False, fields={"rope.dimension_count": 32}),
    "stablelm 2": Spec(
        "stablelm", tied=False, biases=_ALL[:3], left_out=("ffn_norm",), fields={"rope.dimension_count": 32}
    ),
}  # fmt: skip


def tensors_of(spec: Spec, seed: int = 0) -> dict[str, tuple[np.ndarray, GGMLType | None]]:
    """Random weights under llama.cpp's names."""
    rng = np.random.default_rng(seed)
    q, kv = spec.heads * spec.dim, spec.kv_heads * spec.dim
    sizes = {
        "q": q, "kv": kv, "qkv": q + 2 * kv, "hidden": spec.hidden, "mlp": spec.mlp,
        "two_mlp": 2 * spec.mlp,
    }  # fmt: skip
    made: dict[str, tuple[np.ndarray, GGMLType | None]] = {}

    def matrix(name: str, n: int, k: int) -> None:
        kind = spec.kinds[name.split(".")[-2]]
        if kind is None:
            made[name] = (
                (rng.standard_normal((n, k), np.float32) * k**-0.5).astype(np.float32),
                None,
            )
            return
        blocks = k // gguf.GGML_QUANT_SIZES[kind][0]
        made[name] = random_blocks(kind, n, blocks, rng, scale=_SCALES[kind]), kind

    def vector(name: str, n: int, mean: float) -> None:
        made[name] = (mean + rng.standard_normal(n) / 4).astype(np.float32), None

    def norm(name: str, n: int) -> None:
        vector(f"{name}.weight", n, 1.0)
        if spec.arch in LAYER_NORMS:
            vector(f"{name}.bias", n, 0.0)

    matrix("token_embd.weight", spec.vocab, spec.hidden)
    norm("output_norm", spec.hidden)
    if not spec.tied:
        matrix("output.weight", spec.vocab, spec.hidden)
    for i in range(spec.layers):
        for name, (n, k) in _LAYERS.get(spec.arch, _LINEARS).items():
            matrix(f"blk.{i}.{name}.weight", sizes[n], sizes[k])
            if name in spec.biases:
                vector(f"blk.{i}.{name}.bias", sizes[n], 0.0)
        for name in ("attn_norm", "ffn_norm", *_NORMS.get(spec.arch, ())):
            if name not in spec.left_out:
                norm(f"blk.{i}.{name}", spec.dim if name[5:6] in "qk" else spec.hidden)
    return made


def fields_of(spec: Spec) -> dict[str, Any]:
    """The metadata."""
    rms = "" if spec.arch in LAYER_NORMS else "rms_"
    own = {
        "block_count": spec.layers, "context_length": 128, "embedding_length": spec.hidden,
        "feed_forward_length": spec.mlp, "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads, "rope.freq_base": 10000.0,
        f"attention.layer_norm_{rms}epsilon": 1e-5, **spec.fields,
    }  # fmt: skip
    tokens = {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(spec.vocab)],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return {**{f"{spec.arch}.{k}": v for k, v in own.items() if v is not None}, **tokens}


def write_model(path: Path, spec: Spec, more: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Writes the file; `more` tensors take the place of its own (None: left out), as do metadata."""
    tensors = {n: t for n, t in {**tensors_of(spec), **(more or {})}.items() if t is not None}
    kept = {k: v for k, v in {**fields_of(spec), **fields}.items() if v is not None}
    return write(path, tensors, arch=kept.pop("arch", spec.arch), **kept)


def as_read(path: Path) -> Any:
    """The dense model that transformers' own reader makes, fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def of_config(path: Path, config: Any) -> Any:
    """The dense model of a configuration, with the values that transformers reads from the file, fp32."""
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors)
    return model
