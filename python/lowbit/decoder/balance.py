"""How the dimensions of keys are brought nearer to each other before a cache rounds them to int8."""

from __future__ import annotations

import torch
from torch import Tensor


def key_balance(
    bias: Tensor,  # (kv_heads * head_dim,), of the keys' projection
    head_dim: int,
    rotary: int,  # dimensions of a head that turn, d with d + rotary / 2
) -> Tensor | None:  # (kv_heads, head_dim) fp32, or None if all are 1
    """Powers of two that keys are divided by and queries multiplied by, which changes no score.

    A bias is a constant part of all keys. In Qwen2.5 some dimensions have one of 150 beside others of 1, which share
    their scale and then have no digits left. As SmoothQuant does between activations and weights (Xiao et al.,
    arXiv 2211.10438, with its alpha of 0.5), the square root of a dimension's size goes from the keys to the queries: a
    power of two, so that nothing is rounded. The size is the radius on which the rotary embedding turns the bias, and
    at least 1.
    """
    size = bias.detach().float().reshape(-1, head_dim).abs()
    half = rotary // 2
    radius = torch.hypot(size[:, :half], size[:, half:rotary])
    size[:, :rotary] = torch.cat([radius, radius], dim=1)
    balance = torch.exp2((0.5 * size.clamp(min=1).log2()).round())
    return None if bool((balance == 1).all()) else balance
