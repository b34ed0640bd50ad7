"""The choice of the next token."""

from __future__ import annotations

from torch import Tensor


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
