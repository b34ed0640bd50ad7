"""Whole models from the same GGUF file, here and in llama.cpp: writes benchmarks/results/peers_model.json.

Each run is a process of its own, and they take turns. Where the file is the same, the logits after the prompt must
agree before anything counts. Run it on an idle machine, with the Python that `make peers` made; report.py makes the
table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from record import RESULTS, machine
from shapes import THREADS

PROMPT, SHORT, DECODED = 512, 16, 64
ROUNDS = 3
# Cosine of the two logits. llama.cpp rounds activations to int8 at every linear; another prompt gives less than 0.5.
AGREEMENT = 0.98
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


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of the prompt, and decoding after SHORT and after PROMPT tokens."""

    prefill: float
    decode: float
    decode_late: float


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


Forward = Callable[[list[int]], None]


def load_lowbit(path: str, threads: int) -> tuple[Forward, Callable[[], None], Callable[[], Any]]:
    """(appends tokens, forgets them, the logits after the last) of the model in `path`."""
    import torch

    from lowbit.decoder.runner import Runner
    from lowbit.integrations.transformers import load_gguf

    torch.set_num_threads(threads)
    runner = Runner(load_gguf(path), PROMPT + DECODED)
    last: list[torch.Tensor] = []

    def forward(ids: list[int]) -> None:
        last[:] = [runner.forward(torch.tensor(ids))]

    return forward, runner.reset, lambda: last[0].float().numpy()


def load_llama_cpp(
    path: str, threads: int
) -> tuple[Forward, Callable[[], None], Callable[[], Any]]:
    """The same in llama.cpp, through its C API."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = PROMPT + DECODED, PROMPT, PROMPT
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def forward(ids: list[int]) -> None:
        tokens = (lib.llama_token * len(ids))(*ids)
        if status := lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {status}")
        lib.llama_get_logits_ith(context, -1)

    def logits(_kept: object = silent) -> np.ndarray:  # llama.cpp calls it until the end
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocab,)).copy()

    def reset() -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)

    return forward, reset, logits


LOADERS = {"lowbit": load_lowbit, "llama.cpp": load_llama_cpp}


def work(library: str, path: str, threads: int, vocab: int, out: str) -> Speed:
    """Measures one library in this process; saves the logits after the prompt to `out`."""
    forward, reset, logits = LOADERS[library](path, threads)
    ids = np.random.default_rng(1).integers(3, vocab, PROMPT).tolist()

    def seconds(tokens: list[int]) -> float:
        start = time.perf_counter()
        forward(tokens)
        return time.perf_counter() - start

    forward(ids)  # warms up
    np.save(out, logits())
    reset()
    prefill = seconds(ids)
    late = [seconds([ids[i]]) for i in range(DECODED)]
    reset()
    forward(ids[:SHORT])
    early = [seconds([ids[i]]) for i in range(DECODED)]
    return Speed(PROMPT / prefill, *(1 / statistics.median(t) for t in (early, late)))


def measure(
    name: str, runs: list[tuple[str, str, Path]], threads: int, vocab: int, folder: Path
) -> list[dict[str, Any]]:
    """`runs` are (library, type, file); the first is ours. Each is run ROUNDS times, in turn; the medians count."""
    speeds: list[list[dict[str, float]]] = [[] for _ in runs]
    kept: dict[Path, np.ndarray] = {}
    agreement: list[float | None] = [None] * len(runs)
    for _ in range(ROUNDS):
        for i, (library, _, path) in enumerate(runs):
            out = folder / "logits.npy"
            request = [library, str(path), str(threads), str(vocab), str(out)]
            command = [sys.executable, __file__, "--work", *request]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            speeds[i].append(json.loads(done.stdout))
            logits = np.load(out).astype(np.float64)
            if path in kept:
                first = kept[path]
                cosine = float(first @ logits / np.linalg.norm(first) / np.linalg.norm(logits))
                if not cosine >= AGREEMENT:
                    raise RuntimeError(
                        f"{library} and {runs[0][0]} disagree on {name}: cosine {cosine:.4f}"
                    )
                agreement[i] = cosine
            else:
                kept[path] = logits
    return [
        {
            "model": name, "library": library, "type": kind, "threads": threads, "cosine": agreement[i],
            **{key: statistics.median(s[key] for s in speeds[i]) for key in speeds[i][0]},
        }
        for i, (library, kind, _) in enumerate(runs)
    ]  # fmt: skip


def main() -> None:
    """Measures both models on every number of threads and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers_model.json")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        library, path, threads, vocab, out = arguments.work
        print(json.dumps(vars(work(library, path, int(threads), int(vocab), out))))
        return
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
                results += measure(name, runs, threads, vocab, folder)
                print(name, threads, *results[-len(runs) :], sep="\n  ", file=sys.stderr)
    data = {
        "machine": machine(("lowbit", "torch", "transformers", "llama-cpp-python")),
        "prompt": PROMPT, "short": SHORT, "decoded": DECODED, "results": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
