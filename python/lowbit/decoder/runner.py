"""Generates from a transformers LlamaForCausalLM without the Python time of its forward.

`LlamaRunner` uses the model's own tensors and adds a static key-value cache, for one sequence at a
time. Packed models on the CPU run in the compiled decoder, others in torch: the logger "lowbit" says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lowbit.decoder.compiled import CompiledDecoder
from lowbit.decoder.eager import EagerDecoder

# Those whose angles depend on nothing but the position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_logger = logging.getLogger("lowbit")


class LlamaRunner:
    """Greedy generation for one sequence.

    The weights are those of the model when the runner is made, and so is torch's number of threads:
    make a new runner after moving the model or changing either.

    Args:
        model: a LlamaForCausalLM with dense or packed linears.
        max_length: tokens that the cache holds, prompt and answer together.

    Attributes:
        position: tokens of the sequence so far.

    Raises:
        NotImplementedError: the model has another activation than "silu", or a rotary embedding
            that depends on the length of the sequence.
    """

    def __init__(self, model: LlamaForCausalLM, max_length: int) -> None:
        if not isinstance(model, LlamaForCausalLM):
            raise TypeError(f"model must be a LlamaForCausalLM, got {type(model).__name__}")
        config = model.config
        rope_type = model.model.rotary_emb.rope_type
        if config.hidden_act != "silu" or rope_type not in _ROPE_TYPES:
            raise NotImplementedError(
                f"model must have the activation 'silu' and a rope type of {_ROPE_TYPES}, got "
                f"{config.hidden_act!r} and {rope_type!r}"
            )
        if not 0 < max_length <= config.max_position_embeddings:
            raise ValueError(
                f"max_length must be in [1, {config.max_position_embeddings}], got {max_length}"
            )
        self.model = model
        self.max_length = max_length
        self.position = 0
        self._decoder: CompiledDecoder | EagerDecoder
        if obstacle := CompiledDecoder.obstacle(model):
            _logger.info("torch decodes the model, not the compiled decoder: %s", obstacle)
            self._decoder = EagerDecoder(model, max_length)
        else:
            self._decoder = CompiledDecoder(model, max_length)

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
        self.position += len(ids)
        return logits

    def generate(
        self,
        ids: Tensor,  # (T,) int64
        max_new_tokens: int,
        stop: frozenset[int] = frozenset(),
    ) -> Iterator[int]:
        """Appends a prompt and yields the likeliest next tokens, through the first of `stop`.

        Raises:
            ValueError: a logit is NaN.
        """
        for _ in range(max_new_tokens):
            self.forward(ids)
            token = self._decoder.likeliest()
            yield token
            if token in stop:
                return
            ids = torch.tensor([token], dtype=torch.int64, device=ids.device)
