"""What `lowbit run` reports beside the answer: memory, generation speed, perplexity and KL
divergence.

The functions take any transformers causal language model, so the packed and the dense one are
measured alike.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

WINDOW = 512
# Rows of logits that are turned to fp32 at a time: with a vocabulary of 50000, 25 MiB.
_ROWS = 128


def memory() -> dict[str, int]:
    """{"peak_rss_bytes", "rss_bytes"} of this process; the second only on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        # Not ru_maxrss: a child process starts with its parent's.
        kib = {key: int(fields[key].split()[0]) for key in ("VmHWM", "VmRSS")}
        return {"peak_rss_bytes": kib["VmHWM"] * 1024, "rss_bytes": kib["VmRSS"] * 1024}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Stopwatch:
    """Times a stream of tokens: prefill ends with the first token, decoding is the rest."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._paused = 0.0
        self._ticks: list[float] = []

    def tick(self) -> None:
        """A token has arrived."""
        self._ticks.append(time.perf_counter() - self._paused)

    def exclude(self, seconds: float) -> None:
        """Leaves out time spent on something other than the model."""
        self._paused += seconds

    def speeds(self) -> dict[str, float]:
        """{"prefill_tokens_per_second", "decode_tokens_per_second"}; 0 if nothing was decoded."""
        decoded = len(self._ticks) - 1
        return {
            "prefill_tokens_per_second": self._prompt_tokens / (self._ticks[0] - self._start),
            "decode_tokens_per_second": (
                decoded / (self._ticks[-1] - self._ticks[0]) if decoded else 0.0
            ),
        }


def sample_text() -> str:
    """Some English that every installation has: chapter "Data model" of Python's own manual."""
    from pydoc_data.topics import topics

    return f"{topics['objects']}\n{topics['types']}"


def window_logits(
    model: PreTrainedModel,
    ids: Tensor,  # (T,) int64
    window: int = WINDOW,
) -> Iterator[Tensor]:  # (at most `window`, vocabulary)
    """The logits of every position, window by window; each window starts afresh."""
    for part in ids.split(window):
        yield model(part.unsqueeze(0), use_cache=False).logits[0]


def perplexity(logits: list[Tensor], ids: Tensor, window: int = WINDOW) -> float:
    """exp of the mean negative log-likelihood of the tokens after the first of each window."""
    total, count = 0.0, 0
    for rows, tokens in zip(logits, ids.split(window), strict=True):
        for part, target in zip(rows[:-1].split(_ROWS), tokens[1:].split(_ROWS), strict=True):
            total += float(F.cross_entropy(part.float(), target, reduction="sum"))
            count += len(target)
    return math.exp(total / count)


def kl_divergence(reference: list[Tensor], logits: list[Tensor]) -> float:
    """KL(reference || logits) of the next-token distributions: mean over positions, in nats."""
    total, count = 0.0, 0
    for p_rows, q_rows in zip(reference, logits, strict=True):
        for p, q in zip(p_rows.split(_ROWS), q_rows.split(_ROWS), strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            count += len(p)
    return total / count
