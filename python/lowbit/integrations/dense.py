"""Dense modules with the values of packed ones."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.nn import PackedModule, QuantEmbedding, QuantLinear, ReorderedLinear
from lowbit.nn.embedding import ScaledEmbedding, ScaledQuantEmbedding


def dense_of(
    module: QuantLinear | QuantEmbedding, dtype: torch.dtype | None = None
) -> nn.Linear | nn.Embedding:
    """A dense module with the values that a packed one stands for, by default in the dtype of its weight."""
    weight = nn.Parameter(values_of(module).to(dtype or module.dtype))
    n, k = weight.shape
    made: nn.Linear | nn.Embedding
    if isinstance(module, ScaledQuantEmbedding):
        made = ScaledEmbedding(weight, module.padding_idx, module.embed_scale)
    elif isinstance(module, QuantEmbedding):
        made = nn.Embedding(n, k, module.padding_idx, device="meta", dtype=weight.dtype)
    else:
        made = nn.Linear(k, n, device="meta", dtype=weight.dtype)
        made.register_parameter("bias", module._parameters["bias"])
    made.weight = weight
    return made


def values_of(module: PackedModule) -> torch.Tensor:
    """The weight of a packed module, (N, K) fp32, its columns in the order of x."""
    values = module.quant_tensor().dequantize()
    if isinstance(module, ReorderedLinear):
        values = values.index_select(1, torch.argsort(module.input_order.detach()))
    return values
