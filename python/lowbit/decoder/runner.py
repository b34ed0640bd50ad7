"""Generates from a transformers causal language model without the Python time of its forward.

`Runner` uses the model's own tensors and adds a static key-value cache, for one sequence at a time. Packed models of
known architectures run on the CPU in the compiled decoder, other llamas in torch, and any other model in transformers'
own forward: the logger "lowbit" says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.eager import EagerDecoder
from lowbit.decoder.generic import GenericDecoder
from lowbit.decoder.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_logger = logging.getLogger("lowbit")


class Runner:
    """Generation for one sequence.

    The weights are those of the model when the runner is made, and so is torch's number of threads:
    make a new runner after moving the model or changing either.

    Args:
        model: a causal language model of transformers, with dense or packed linears.
        max_length: tokens that the cache holds, prompt and answer together.
        cache_dtype: of the compiled decoder's keys and values: torch.float32, bfloat16, float16, or int8 or
            float8_e4m3fn with scales for each head and position: one for a value, and one for a key, with int8 for
            32 dimensions of it. None is bfloat16 for a model of bfloat16, and float32 for others.

    Attributes:
        position: tokens of the sequence so far.

    Raises:
        TypeError: the model is no causal language model of transformers.
        ValueError: max_length is beyond what the model is made for.
        NotImplementedError: the model keeps no cache of keys and values, or cache_dtype is given and the compiled
            decoder cannot decode the model.
    """

    def __init__(
        self, model: PreTrainedModel, max_length: int, cache_dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
            raise TypeError(
                f"model must be a causal language model of transformers, got {type(model).__name__}"
            )
        most = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
        if not 0 < max_length <= most:
            raise ValueError(f"max_length must be in [1, {most}], got {max_length}")
        self.model = model
        self.max_length = max_length
        self.position = 0
        self._tokens = torch.empty(max_length, dtype=torch.int64, device="cpu")
        self._decoder = _decoder(model, max_length, cache_dtype)

    def reset(self) -> None:
        """Forgets the sequence."""
        self.position = 0

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,  # (T,) int64
    ) -> Tensor:  # (vocabulary,)
        """Appends tokens and returns the logits after the last one, valid until the next call."""
        if ids.dim() != 1 or not 0 < len(ids) <= self.max_length - self.position:
            raise ValueError(
                f"ids must be 1-D with 1 to {self.max_length - self.position} tokens (position "
                f"{self.position}, max_length {self.max_length}), got shape {tuple(ids.shape)}"
            )
        logits = self._decoder.forward(ids, self.position)
        self._tokens[self.position : self.position + len(ids)] = ids
        self.position += len(ids)
        return logits

    def generate(
        self,
        ids: Tensor,  # (T,) int64
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Appends a prompt and yields the next tokens as they come, through the first of `stop`.

        Without `sampling` they are the likeliest ones.

        Raises:
            ValueError: a logit is NaN.
        """
        sampler = None if sampling is None or sampling.plain else Sampler(sampling)
        for _ in range(max_new_tokens):
            logits = self.forward(ids)
            seen = self._tokens[: self.position]
            token = self._decoder.likeliest() if sampler is None else sampler(logits, seen)
            yield token
            if token in stop:
                return
            ids = torch.tensor([token], dtype=torch.int64, device=ids.device)


def _decoder(
    model: PreTrainedModel, max_length: int, cache_dtype: torch.dtype | None
) -> CompiledDecoder | EagerDecoder | GenericDecoder:
    obstacle = CompiledDecoder.obstacle(model)
    if obstacle is None:
        return CompiledDecoder(model, max_length, cache_dtype)
    if cache_dtype is not None:
        raise NotImplementedError(
            f"cache_dtype={cache_dtype} needs the compiled decoder, which cannot run the model: {obstacle}"
        )
    if EagerDecoder.serves(model):
        _logger.info("torch decodes the model, not the compiled decoder: %s", obstacle)
        return EagerDecoder(cast("LlamaForCausalLM", model), max_length)
    _logger.warning("transformers decodes the model, not the compiled decoder: %s", obstacle)
    return GenericDecoder(model)
