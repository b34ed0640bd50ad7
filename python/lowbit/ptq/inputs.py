"""What the matrices of layers multiply: of a linear its inputs, of a convolution their patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowbit.nn.conv import CONVOLUTIONS, matrix_of, rows_of


def features_of(module: nn.Module) -> int:
    """K of the matrix of a linear or convolution; 0 of others."""
    if isinstance(module, CONVOLUTIONS):
        return matrix_of(module).shape[1]
    features: Any = getattr(module, "in_features", 0)
    return features  # type: ignore[no-any-return]


def multiplies_rows(module: Any) -> bool:
    """Whether one matrix multiplies all that goes into a module: not with groups of channels."""
    if isinstance(module, CONVOLUTIONS):
        return bool(module.groups == 1)
    return isinstance(module, nn.Linear)


def inputs_of(module: Any, x: Tensor) -> Iterator[Tensor]:
    """What the matrix of a layer multiplies of its input, in parts: patches are made an image at a time."""
    if not isinstance(module, CONVOLUTIONS):
        yield x
        return
    conv: Any = module
    images = x[None] if x.dim() == len(conv.kernel_size) + 1 else x
    for i in range(len(images)):
        yield rows_of(module, images[i : i + 1]).reshape(-1, features_of(module))
