"""A decoder made of the model's own forward and transformers' own cache, for any architecture and device."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.decoder.sampling import likeliest


class GenericDecoder:
    """Decodes with `model.forward`.

    Raises:
        NotImplementedError: the model keeps no cache of keys and values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in parameters:
            raise NotImplementedError(
                f"model must keep a cache of keys and values, got a {type(model).__name__}"
            )
        self._model: Any = model
        # Logits of a long prompt take more memory than its keys and values.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache: Any = None
        self._length = 0
        self._logits = torch.empty(0, dtype=torch.float32, device="cpu")

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,  # (T,) int64
        position: int,
    ) -> Tensor:  # (vocabulary,)
        """Appends tokens at a position, which is 0 or behind the last token; returns the logits after the last.

        Raises:
            ValueError: the position is another one.
        """
        if position == 0:
            self._cache, self._length = None, 0
        if position != self._length:
            raise ValueError(f"position must be 0 or {self._length}, got {position}")
        out = self._model(ids[None], past_key_values=self._cache, use_cache=True, **self._options)
        self._cache = out.past_key_values
        self._length += len(ids)
        self._logits = out.logits[0, -1]
        return self._logits

    @torch.inference_mode()
    def likeliest(self) -> int:
        """The token of the largest logit.

        Raises:
            ValueError: a logit is NaN.
        """
        return likeliest(self._logits.float())
