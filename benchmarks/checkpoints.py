"""Real GGUF files as stored: writes benchmarks/results/checkpoints.json.

For each model: greedy tokens beside those of transformers' own dequantized fp32 model, bits per weight in memory beside
the file's, perplexity and KL beside llama.cpp's on the same text, the KL of the cache's dtypes, and the KL of what
llama.cpp makes of an exported file. Nothing is timed. It takes the Python that `make peers` made, and 6 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import real_models
import torch
from llama_cpp_logits import LlamaCpp
from record import RESULTS, machine
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import lowbit
from lowbit.cli import measure
from lowbit.decoder.runner import Runner
from lowbit.export.gguf import to_gguf
from lowbit.integrations.load import load_tokenizer
from lowbit.io.readers.gguf import GGUFFile
from lowbit.nn import PackedModule

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, there was",
    "The three laws of thermodynamics are",
    "To bake bread you need",
)
NEW_TOKENS = 64
WINDOWS = 4  # of text, each of measure.WINDOW tokens
# The cache is judged on the last tokens of so many, one by one.
CACHED, JUDGED = 384, 128
CACHES = {
    "fp32 activations, int8": (torch.float32, torch.int8),
    "fp32 activations, fp8": (torch.float32, torch.float8_e4m3fn),
    "bf16 activations, bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 activations, int8": (torch.bfloat16, torch.int8),
    "bf16 activations, fp8": (torch.bfloat16, torch.float8_e4m3fn),
}
EXPORTED = "q4_0"


def greedy(ours: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """How many prompts get the same tokens, and the largest difference of logits along them."""
    same, worst, largest = 0, 0.0, 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        runner = Runner(ours, ids.shape[1] + NEW_TOKENS)
        answer = list(runner.generate(ids[0], NEW_TOKENS))
        whole = torch.cat([ids[0], torch.tensor(answer)])[None]
        with torch.inference_mode():
            expected = dense(whole).logits[0, ids.shape[1] - 1 : -1]
            found = ours(whole).logits[0, ids.shape[1] - 1 : -1]
        same += expected.argmax(-1).tolist() == answer
        worst = max(worst, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return {
        "prompts": len(PROMPTS), "tokens_each": NEW_TOKENS, "same_tokens": same,
        "largest_logit_difference": worst, "largest_logit": largest,
    }  # fmt: skip


def bits(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Bits per packed weight in memory and in the file."""
    # Tied layers share their buffers.
    packed = {id(m._buffers): m for m in model.modules() if isinstance(m, PackedModule)}
    weights = sum(m.shape[0] * m.shape[1] for m in packed.values())
    in_file = [t for t in GGUFFile(path).tensors.values() if len(t.shape) > 1]
    return {
        "types": dict(Counter(t.type.name for t in in_file)),
        "bits_in_memory": 8 * sum(m.kernel_weight().nbytes for m in packed.values()) / weights,
        "bits_in_file": 8
        * sum(t.nbytes for t in in_file)
        / sum(math.prod(t.shape) for t in in_file),
    }


def cached_logits(model: PreTrainedModel, ids: Tensor, cache: torch.dtype) -> Tensor:
    """The logits after each of the last JUDGED tokens, decoded one by one: (JUDGED, vocabulary)."""
    runner = Runner(model, CACHED, cache_dtype=cache)
    runner.forward(ids[: CACHED - JUDGED])
    return torch.stack(
        [runner.forward(ids[i : i + 1]).float().clone() for i in range(CACHED - JUDGED, CACHED)]
    )


def exported(model: PreTrainedModel, path: Path, ids: Tensor) -> dict[str, Any]:
    """Exports a model whose layers have GGUF's types, and compares llama.cpp's logits of the file with ours."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "exported.gguf"
        to_gguf(model, target, tokenizer=GGUFFile(path))
        theirs = llama_cpp_windows(target, ids)
    with torch.inference_mode():
        ours = list(measure.window_logits(model, ids))
    return {
        "format": EXPORTED,
        "perplexity": measure.perplexity(ours, ids),
        "llama.cpp perplexity": measure.perplexity(theirs, ids),
        "kl": measure.kl_divergence(ours, theirs),
    }


def llama_cpp_windows(path: Path, ids: Tensor) -> list[Tensor]:
    """llama.cpp's logits, window by window."""
    engine = LlamaCpp(str(path), os.cpu_count() or 1, measure.WINDOW, measure.WINDOW)
    return [torch.from_numpy(engine.all_logits(w.tolist())) for w in ids.split(measure.WINDOW)]


def examine(name: str, path: Path) -> dict[str, Any]:
    """Everything about one model."""
    tokenizer = load_tokenizer(path)
    text = tokenizer(measure.sample_text(), return_tensors="pt").input_ids[0]
    ids = text[: WINDOWS * measure.WINDOW]
    ours = lowbit.load_model(path, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    result = {"model": name, **bits(ours, path), "greedy": greedy(ours, dense, tokenizer)}
    with torch.inference_mode():
        reference = list(measure.window_logits(dense, ids))
    del dense
    in_bf16 = lowbit.load_model(path, dtype=torch.bfloat16)
    with torch.inference_mode():
        columns = {
            "lowbit, fp32 activations": list(measure.window_logits(ours, ids)),
            "lowbit, bf16 activations": list(measure.window_logits(in_bf16, ids)),
        }
    columns["llama.cpp"] = llama_cpp_windows(path, ids)
    result["text"] = {
        what: {
            "perplexity": measure.perplexity(logits, ids),
            "kl": measure.kl_divergence(reference, logits),
        }
        for what, logits in {"dequantized fp32": reference, **columns}.items()
    }
    del columns, reference
    exact = cached_logits(ours, text, torch.float32)
    models = {torch.float32: ours, torch.bfloat16: in_bf16}
    result["cache_kl"] = {
        what: measure.kl_divergence([exact], [cached_logits(models[dtype], text, cache)])
        for what, (dtype, cache) in CACHES.items()
    }
    del ours, in_bf16, models
    result["export"] = exported(
        lowbit.load_model(path, dtype=torch.float32, format=EXPORTED), path, ids
    )
    return result


def main() -> None:
    """Examines every model and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="only this one; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoints.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    results = []
    for name, path in real_models.files().items():
        if arguments.model and name not in arguments.model:
            continue
        results.append(examine(name, path))
        print(json.dumps(results[-1], indent=1), file=sys.stderr)
    about = machine(("lowbit", "torch", "transformers", "llama-cpp-python"))
    data = {"machine": about, "text_tokens": WINDOWS * measure.WINDOW, "results": results}
    arguments.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
