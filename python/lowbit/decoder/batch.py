"""Generates for several sequences at a time, which share every read of the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.sampling import Sampler, Sampling


@dataclass(slots=True)
class _Active:
    """A sequence that is being generated."""

    prompt: int
    tokens: list[int]
    left: int
    sampler: Sampler | None


class BatchRunner:
    """Generation for several sequences in the compiled decoder.

    Args:
        model: a model that the compiled decoder can run.
        max_length: tokens of a sequence that the cache holds, prompt and answer together.
        sequences: how many are generated at a time.
        cache_dtype: as in `lowbit.decoder.runner.Runner`.

    Raises:
        NotImplementedError: the compiled decoder cannot run the model.
        ValueError: sequences is less than 1.

    Example:
        >>> for prompt, token in BatchRunner(model, 512, sequences=8).generate(prompts, 100):
        ...     answers[prompt].append(token)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int,
        sequences: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, got {sequences}")
        self.max_length = max_length
        self.sequences = sequences
        self._decoder = CompiledDecoder(model, max_length, cache_dtype, sequences)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Tensor],  # (T,) int64 each
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yields (index of a prompt, its next token) as they come, through the first of `stop` or the last one.

        A prompt that waits takes the place of a sequence that has ended. Each has its own draws, from the same seed.

        Raises:
            ValueError: a prompt does not fit max_length with its answer, or a logit is NaN.
        """
        for i, ids in enumerate(prompts):
            if ids.dim() != 1 or not 0 < len(ids) <= self.max_length - max_new_tokens + 1:
                raise ValueError(
                    f"prompt {i} must be 1-D with 1 to {self.max_length - max_new_tokens + 1} tokens "
                    f"(max_length {self.max_length}, max_new_tokens {max_new_tokens}), got shape {tuple(ids.shape)}"
                )
        waiting = deque(enumerate(prompts) if max_new_tokens > 0 else ())
        free = list(range(self.sequences))
        active: dict[int, _Active] = {}

        def take(sequence: int, row: int, logits: Tensor) -> tuple[int, int]:
            state = active[sequence]
            if state.sampler is None:
                token = self._decoder.likeliest(row)
            else:
                seen = torch.tensor(state.tokens, dtype=torch.int64, device="cpu")
                token = state.sampler(logits, seen)
            state.tokens.append(token)
            state.left -= 1
            if state.left == 0 or token in stop:
                del active[sequence]
                free.append(sequence)
            return state.prompt, token

        while waiting or active:
            while waiting and free:
                prompt, ids = waiting.popleft()
                sequence = free.pop()
                sampler = None if sampling is None or sampling.plain else Sampler(sampling)
                active[sequence] = _Active(prompt, ids.tolist(), max_new_tokens, sampler)
                yield take(sequence, 0, self._decoder.forward(ids, 0, sequence))
            if active:
                sequences = list(active)
                states = [active[sequence] for sequence in sequences]
                logits = self._decoder.step(
                    [state.tokens[-1] for state in states],
                    [(q, len(s.tokens) - 1) for q, s in zip(sequences, states, strict=True)],
                )
                for row, sequence in enumerate(sequences):
                    yield take(sequence, row, logits[row])
