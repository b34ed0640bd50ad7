"""Whole models from the same GGUF file, here and in llama.cpp: writes benchmarks/results/peers_model.json.

Run it on an idle machine, with the Python that `make peers` made; report.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from model_speed import DECODED, PROMPT, SHORT, measure
from record import RESULTS, machine
from shapes import THREADS

SIZES = {
    "hidden": 2048,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "intermediate": 8192,
    "vocab": 128256,
}
# fp16 fields of a block, and what they hold so that weights have a deviation of about 0.02. The other bytes are random.
SCALES = {
    Type.Q4_0: {0: 0.004},
    Type.Q4_K: {0: 1e-4, 2: 7e-4},
    Type.IQ4_NL: {0: 2.5e-4},
}


def blocks(kind: Type, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random weight (N, K) as the bytes of its blocks."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    for at, scale in SCALES[kind].items():
        data[:, at : at + 2] = np.float16(scale).reshape(1).view(np.uint8)
    return data.reshape(shape[0], -1)


def write_llama(path: Path, kind: Type) -> None:
    """A Llama of 1.2 billion random weights, all linears and the tied embedding of one type."""
    s, rng = SIZES, np.random.default_rng(0)
    kv = s["hidden"] * s["kv_heads"] // s["heads"]
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_block_count(s["layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["intermediate"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(s["vocab"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            writer.add_tensor(f"{name}.weight", blocks(kind, shape, rng), raw_dtype=kind)

    h, m = s["hidden"], s["intermediate"]
    add("token_embd", s["vocab"], h)
    add("output_norm", h)
    for i in range(s["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}", h)
        for name, shape in {
            "attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h),
            "ffn_gate": (m, h), "ffn_up": (m, h), "ffn_down": (h, m),
        }.items():  # fmt: skip
            add(f"blk.{i}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Measures both models on every number of threads and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers_model.json")
    arguments = parser.parse_args()
    from lowbit.cli.run import default_model

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = {kind: folder / f"{kind.name}.gguf" for kind in SCALES}
        for kind, path in files.items():
            write_llama(path, kind)
        smol = default_model()
        models = {
            "SmolLM2-135M": (
                [("lowbit", "as stored", smol), ("llama.cpp", "as stored", smol)],
                49152,
            ),
            "Llama of 1.2 B": (
                [
                    ("lowbit", "Q4_0", files[Type.Q4_0]),
                    *(("llama.cpp", kind.name, path) for kind, path in files.items()),
                ],
                SIZES["vocab"],
            ),
        }
        for name, (runs, vocab) in models.items():
            path = runs[0][2]
            for threads in THREADS if path is smol else THREADS[1:]:
                results += measure(name, runs, threads, vocab)
                print(name, threads, *results[-len(runs) :], sep="\n  ", file=sys.stderr)
    data = {
        "machine": machine(("lowbit", "torch", "transformers", "llama-cpp-python")),
        "prompt": PROMPT, "short": SHORT, "decoded": DECODED, "results": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
