"""Small GGUF files for the tests: written by package `gguf`, or byte by byte to be damaged."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte ranges of a block that hold fp16 numbers.
HALF_FIELDS = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.TQ2_0: (64,),
    GGMLType.MXFP4: (),
    GGMLType.NVFP4: (),
    GGMLType.Q1_0: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ1_M: (),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
}


def random_blocks(
    kind: GGMLType, n: int, blocks: int, rng: np.random.Generator, scale: float | None = None
) -> np.ndarray:
    """(n, blocks * block bytes) of random bytes with finite scales, or with this one, and no code
    beyond the table.
    """
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (n * blocks, size), dtype=np.uint8)
    for start in HALF_FIELDS[kind]:
        half = data[:, start : start + 2].copy().view(np.uint16)
        # The top exponent is inf and NaN.
        half[(half & 0x7C00) == 0x7C00] ^= 0x4000
        if scale is not None:
            half[:] = np.float16(scale).view(np.uint16)
        data[:, start : start + 2] = half.view(np.uint8)
    if kind == GGMLType.IQ1_M:
        # A nibble of each of the last four words, the last one with the top of the exponent.
        if scale is None:
            data[:, 55] &= 0xBF
        else:
            bits = int(np.float16(scale).view(np.uint16))
            for i in range(4):
                data[:, 49 + 2 * i] = data[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
    if kind == GGMLType.MXFP4:
        # 255 is NaN, and from 253 on the largest value overflows fp32.
        data[:, 0] %= 253
    if kind == GGMLType.NVFP4:
        # 255 is no number of E4M3.
        data[:, :4] %= 255
    if kind == GGMLType.TQ2_0:
        pairs = data[:, :64]
        # Two set bits are code 3: clear the low one.
        pairs &= ~((pairs >> 1) & 0x55)
    return data.reshape(n, blocks * size)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLType | None]], **fields) -> Path:
    """Writes a file with GGUFWriter; a type of None means a dense array."""
    writer = gguf.GGUFWriter(path, fields.pop("arch", "llama"))
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor_entry(
    name: bytes = b"w", dims: tuple[int, ...] = (32, 2), kind: int = 2, offset: int = 0
) -> bytes:
    """One entry of the tensor table; kind 2 is Q4_0."""
    head = string(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def raw_file(
    entries: list[bytes],
    *,
    fields: bytes = b"",
    num_fields: int = 0,
    num_tensors: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: bytes = bytes(2 * 18),
) -> bytes:
    """The bytes of a GGUF file, each count and field as given."""
    count = len(entries) if num_tensors is None else num_tensors
    head = magic + struct.pack("<IQQ", version, count, num_fields) + fields + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


@dataclass(frozen=True)
class Llama:
    """A tiny llama; hidden, head and MLP sizes are multiples of 32, the smallest block of GGUF."""

    vocab: int = 320
    hidden: int = 96
    mlp: int = 160
    layers: int = 2
    heads: int = 3
    kv_heads: int = 1
    context: int = 128
    tied: bool = True
    bias: bool = False
    kind: GGMLType = GGMLType.Q4_1
    embedding_kind: GGMLType = GGMLType.Q8_0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def llama_tensors(spec: Llama, seed: int = 0) -> dict[str, tuple[np.ndarray, GGMLType | None]]:
    """Random weights, quantized by package `gguf`, under llama.cpp's names."""
    rng = np.random.default_rng(seed)

    def matrix(n: int, k: int, kind: GGMLType) -> tuple[np.ndarray, GGMLType]:
        w = rng.standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5)
        return gguf.quantize(w, kind), kind

    def vector(n: int, mean: float) -> tuple[np.ndarray, None]:
        return (mean + rng.standard_normal(n) / 4).astype(np.float32), None

    q, kv = spec.hidden, spec.kv_heads * spec.head_dim
    tensors = {
        "token_embd.weight": matrix(spec.vocab, spec.hidden, spec.embedding_kind),
        "output_norm.weight": vector(spec.hidden, 1.0),
    }
    if not spec.tied:
        tensors["output.weight"] = matrix(spec.vocab, spec.hidden, spec.embedding_kind)
    for i in range(spec.layers):
        shapes = {
            "attn_q": (q, spec.hidden),
            "attn_k": (kv, spec.hidden),
            "attn_v": (kv, spec.hidden),
            "attn_output": (spec.hidden, q),
            "ffn_gate": (spec.mlp, spec.hidden),
            "ffn_up": (spec.mlp, spec.hidden),
            "ffn_down": (spec.hidden, spec.mlp),
        }
        for name, (n, k) in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = matrix(n, k, spec.kind)
            if spec.bias and name.startswith("attn"):
                tensors[f"blk.{i}.{name}.bias"] = vector(n, 0.0)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = vector(spec.hidden, 1.0)
    return tensors


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_fields(spec: Llama) -> dict[str, object]:
    """The metadata of `spec`, with a byte-level tokenizer: 256 tokens, a merge, 3 specials."""
    letters = list(bytes_to_unicode().values())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "th"]
    tokens += [f"<unused{i}>" for i in range(spec.vocab - len(tokens))]
    return {
        "llama.block_count": spec.layers,
        "llama.context_length": spec.context,
        "llama.embedding_length": spec.hidden,
        "llama.feed_forward_length": spec.mlp,
        "llama.attention.head_count": spec.heads,
        "llama.attention.head_count_kv": spec.kv_heads,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": spec.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": spec.vocab,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (spec.vocab - 3),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_llama(path: Path, spec: Llama | None = None, **changes) -> Path:
    """Writes a tiny llama; `changes` overwrite metadata (None drops a key)."""
    spec = spec or Llama()
    fields = {k: v for k, v in {**llama_fields(spec), **changes}.items() if v is not None}
    return write(path, llama_tensors(spec), **fields)
