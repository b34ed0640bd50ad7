"""Dense modules with the values of packed ones, and the dtype of what is dense beside these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.nn import PackedModule, QuantConv, QuantEmbedding, QuantLinear


def dense_of(module: PackedModule, dtype: torch.dtype | None = None) -> nn.Module:
    """A dense module with the values that a packed one stands for, by default in the dtype of its weight.

    Raises:
        NotImplementedError: it is neither a linear, an embedding nor a convolution.
    """
    if isinstance(module, QuantEmbedding):
        return module.to_embedding(dtype)
    if isinstance(module, QuantLinear):
        return module.to_linear(dtype)
    if isinstance(module, QuantConv):
        return module.to_conv(dtype)
    raise NotImplementedError(
        f"a {type(module).__name__} has no dense form; expected a linear, an embedding or a convolution"
    )


def values_of(module: PackedModule) -> Tensor:
    """The weight of a packed linear or embedding, (N, K) fp32, its columns in the order of x."""
    return dense_of(module, torch.float32).weight.detach()  # type: ignore[union-attr,operator,return-value]


def cast_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters, and not buffers: angles of positions need their bits. Packed weights stand for `dtype` then."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.set_weight_dtype(dtype)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and name != "input_scale":
                parameter.data = parameter.data.to(dtype)
