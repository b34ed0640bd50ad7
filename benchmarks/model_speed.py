"""How fast a model runs, here and in llama.cpp: each run is a process of its own, and they take turns.

Where the file is the same, the logits after the prompt must agree before anything counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp_logits import LlamaCpp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, SHORT, DECODED = 512, 16, 64
ROUNDS = 3
# Cosine of the two logits. llama.cpp rounds activations to int8 at every linear; another prompt gives less than 0.5.
AGREEMENT = 0.98


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of the prompt, and decoding after SHORT and after `prompt` tokens."""

    prefill: float
    decode: float
    decode_late: float


Forward = Callable[[list[int]], None]
Engine = tuple[Forward, Callable[[], None], Callable[[], Any]]


def _lowbit(path: str, threads: int, context: int, int8_x: bool, int8_cache: bool) -> Engine:
    """(appends tokens, forgets them, the logits after the last) of a model in bf16."""
    import torch

    import lowbit
    from lowbit.decoder.runner import Runner

    torch.set_num_threads(threads)
    model = lowbit.load_model(path, dtype=torch.bfloat16)
    if int8_x:
        _take_int8(model)
    runner = Runner(model, context, cache_dtype=torch.int8 if int8_cache else None)
    last: list[torch.Tensor] = []

    def forward(ids: list[int]) -> None:
        last[:] = [runner.forward(torch.tensor(ids))]

    return forward, runner.reset, lambda: last[0].float().numpy()


def _take_int8(model: PreTrainedModel) -> None:
    """Quantizes the activations of every linear to int8 by rows; the weights stay as they are."""
    import torch

    from lowbit.nn import QuantLinear
    from lowbit.weights.quantized import QuantTensor

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            weight = module.quant_tensor()
            taking = dataclasses.replace(weight.format, activation="int8")
            weight = QuantTensor(taking, weight.shape, weight.tensors)
            model.set_submodule(
                name, QuantLinear.from_quant_tensor(weight, module.bias, torch.bfloat16)
            )


def _llama_cpp(path: str, threads: int, context: int) -> Engine:
    engine = LlamaCpp(path, threads, context, context)
    return engine.forward, engine.reset, engine.logits


ENGINES: dict[str, Callable[[str, int, int], Engine]] = {
    "lowbit": lambda *a: _lowbit(*a, int8_x=False, int8_cache=False),
    "lowbit, int8 activations": lambda *a: _lowbit(*a, int8_x=True, int8_cache=False),
    "lowbit, int8 cache": lambda *a: _lowbit(*a, int8_x=False, int8_cache=True),
    "llama.cpp": _llama_cpp,
}


def work(engine: str, path: str, threads: int, vocab: int, prompt: int, out: str) -> Speed:
    """Measures one library in this process; saves the logits after the prompt to `out`."""
    forward, reset, logits = ENGINES[engine](path, threads, prompt + DECODED)
    ids = np.random.default_rng(1).integers(3, vocab, prompt).tolist()

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
    return Speed(prompt / prefill, *(1 / statistics.median(t) for t in (early, late)))


def measure(
    name: str,
    runs: list[tuple[str, str, Path]],
    threads: int,
    vocab: int,
    prompt: int = PROMPT,
) -> list[dict[str, Any]]:
    """`runs` are (engine, type, file); the first is ours. Each is run ROUNDS times, in turn; the medians count.

    Raises:
        RuntimeError: two engines disagree about the same file.
    """
    speeds: list[list[dict[str, float]]] = [[] for _ in runs]
    kept: dict[Path, np.ndarray] = {}
    agreement: list[float | None] = [None] * len(runs)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for i, (library, _, path) in enumerate(runs):
                out = Path(folder) / "logits.npy"
                request = [library, str(path), str(threads), str(vocab), str(prompt), str(out)]
                command = [sys.executable, __file__, *request]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                speeds[i].append(json.loads(done.stdout))
                logits = np.load(out).astype(np.float64)
                first = kept.setdefault(path, logits)
                cosine = float(first @ logits / np.linalg.norm(first) / np.linalg.norm(logits))
                if not cosine >= AGREEMENT:
                    raise RuntimeError(
                        f"{library} and {runs[0][0]} disagree on {name}: cosine {cosine:.4f}"
                    )
                agreement[i] = None if first is logits else cosine
    return [
        {
            "model": name, "library": library, "type": kind, "threads": threads, "prompt": prompt,
            "cosine": agreement[i],
            **{key: statistics.median(s[key] for s in speeds[i]) for key in speeds[i][0]},
        }
        for i, (library, kind, _) in enumerate(runs)
    ]  # fmt: skip


def main() -> None:
    """One run, in the process that `measure` starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("engine", "path", "threads", "vocab", "prompt", "out"):
        parser.add_argument(name)
    a = parser.parse_args()
    speed = work(a.engine, a.path, int(a.threads), int(a.vocab), int(a.prompt), a.out)
    print(json.dumps(dataclasses.asdict(speed)))


if __name__ == "__main__":
    main()
