"""Where a dense model of transformers holds the weight that a layer of the quantized one stands for."""

from __future__ import annotations

import torch
from torch import nn


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The weight (N, K) of the layer `name`, a view: of a Conv1D, and of an expert, which is a part of a parameter."""
    path, _, last = name.rpartition(".")
    parent, _, key = path.rpartition(".")
    fused = getattr(model.get_submodule(parent), key, None) if last.isdigit() else None
    if isinstance(fused, nn.Parameter):
        rows = fused[int(last)]
        return rows.t() if getattr(model.get_submodule(parent), "is_transposed", False) else rows
    module = model.get_submodule(name)
    return module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
