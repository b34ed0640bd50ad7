"""Dense modules with the values of packed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear


def dense_of(module: PackedModule, dtype: torch.dtype | None = None) -> nn.Linear | nn.Embedding:
    """A dense module with the values that a packed one stands for, by default in the dtype of its weight.

    Raises:
        NotImplementedError: it is neither a linear nor an embedding.
    """
    if isinstance(module, QuantEmbedding):
        return module.to_embedding(dtype)
    if isinstance(module, QuantLinear):
        return module.to_linear(dtype)
    raise NotImplementedError(
        f"a {type(module).__name__} has no dense form; expected a linear or an embedding"
    )


def values_of(module: PackedModule) -> Tensor:
    """The weight of a packed linear or embedding, (N, K) fp32, its columns in the order of x."""
    return dense_of(module, torch.float32).weight.detach()
