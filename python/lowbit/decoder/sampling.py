"""The choice of the next token: the likeliest one, or one drawn after transformers' own filters of the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the defaults change nothing but that they are the likeliest ones.

    The filters are transformers', in the order of its `generate`: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens; 0 means all.
        top_p: draw from the fewest likeliest tokens with this probability together.
        min_p: draw from tokens at least this probable, as a fraction of the likeliest one's probability.
        repetition_penalty: what positive logits of tokens that the sequence holds are divided by, and negative ones
            multiplied by.
        seed: of the draws; None takes another one each time.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> list(runner.generate(ids, 100, sampling=Sampling(temperature=0.8, top_p=0.95, seed=1)))
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0, math.inf),
        ):
            value = getattr(self, name)
            excluded = name in ("top_p", "repetition_penalty") and value == low
            if not (low <= value <= high) or excluded or math.isinf(value):
                ends = f"{'(' if name in ('top_p', 'repetition_penalty') else '['}{low}, {high}"
                raise ValueError(
                    f"{name} must be in {ends}{')' if high == math.inf else ']'}, got {value}"
                )

    @property
    def plain(self) -> bool:
        """Whether every token is the likeliest one as the model has it."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self._draws = sampling.temperature > 0
        self._generator = torch.Generator("cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        steps: list[LogitsProcessor] = []
        if sampling.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if self._draws:
            steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                steps.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                steps.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                steps.append(MinPLogitsWarper(sampling.min_p))
        self._steps = LogitsProcessorList(steps)

    @torch.inference_mode()
    def __call__(
        self,
        logits: Tensor,  # (vocabulary,)
        tokens: Tensor,  # (T,) int64: the sequence so far
    ) -> int:
        """The next token.

        Raises:
            ValueError: a logit is NaN.
        """
        scores = logits.float().cpu()
        token = likeliest(scores)  # also the check for NaN
        if self._steps:
            # The processors may write to what they are given.
            scores = self._steps(cast("LongTensor", tokens[None].cpu()), scores[None].clone())[0]
            token = int(scores.argmax())
        if not self._draws:
            return token
        return int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))


def likeliest(
    logits: Tensor,  # (vocabulary,) fp32
) -> int:
    """The token of the largest logit, the first of several.

    Raises:
        ValueError: a logit is NaN.
    """
    token = int(logits.argmax())  # finds a NaN before any number
    if logits[token].isnan():
        raise ValueError("the logits are NaN: the model's weights or its arithmetic are broken")
    return token
