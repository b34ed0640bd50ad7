"""The dense side of `lowbit run --compare`, run as a process of its own so that its peak memory is
its own.

`python -m lowbit.cli.baseline REQUEST` takes one JSON argument, runs transformers' own bf16 model with the values that
the weights stand for, and writes `result.json` and `logits.pt` into the directory that the request names.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lowbit.cli import measure
from lowbit.integrations.load import load_decoded

RESULT, LOGITS = "result.json", "logits.pt"


@dataclass(frozen=True)
class Request:
    """`prompt_ids` and `text_ids` are token numbers, of which `window` are seen at a time; results go to the
    directory `out`.
    """

    model: str
    prompt_ids: list[int]
    text_ids: list[int]
    max_new_tokens: int
    window: int
    threads: int
    out: str

    def to_json(self) -> str:
        """The argument of the process that runs this request."""
        return json.dumps(asdict(self))


class _Streamer(BaseStreamer):
    """The first `put` is the prompt, not a token."""

    def __init__(self, prompt_tokens: int) -> None:
        self.watch = measure.Stopwatch(prompt_tokens)
        self._started = False

    def put(self, value: Tensor) -> None:
        if self._started:
            self.watch.tick()
        self._started = True

    def end(self) -> None:
        pass


def run(request: Request) -> None:
    """Loads the dense model, answers the prompt, and writes its speeds, memory and logits to `request.out`."""
    torch.set_num_threads(request.threads)
    start = time.perf_counter()
    model: Any = load_decoded(request.model, torch.bfloat16)
    load_seconds = time.perf_counter() - start
    prompt = torch.tensor([request.prompt_ids], dtype=torch.int64, device="cpu")
    streamer = _Streamer(prompt.shape[1])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )[0, prompt.shape[1] :]
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    result = {
        **streamer.watch.speeds(),
        **measure.memory(),
        "load_seconds": load_seconds,
        "new_tokens": len(tokens),
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / model.num_parameters(),
    }
    ids = torch.tensor(request.text_ids, dtype=torch.int64, device="cpu")
    with torch.inference_mode():
        logits = list(measure.window_logits(model, ids, request.window))
    result["perplexity"] = measure.perplexity(logits, ids, request.window)
    out = Path(request.out)
    torch.save(logits, out / LOGITS)
    (out / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    run(Request(**json.loads(sys.argv[1])))
