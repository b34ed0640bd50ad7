"""LowRank: the product of two thin matrices, a term of a weight that is a sum of terms (CALDERA, arXiv 2405.18886)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.weights.quantized import QuantTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowRank(NamedTuple):
    """L R, with left L (N, r) and right R (r, K), both dense (fp32, bf16 or fp16) or both quantized.

    Example:
        >>> term = LowRank(torch.randn(64, 8), torch.randn(8, 128))
        >>> y = lowbit.linear(torch.randn(2, 128), CompositeWeight(qt, term))
    """

    left: Tensor | QuantTensor
    right: Tensor | QuantTensor

    @property
    def rank(self) -> int:
        """r."""
        return int(self.right.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def check(self, n: int, k: int, device: torch.device) -> None:
        """Raises TypeError or ValueError unless this is a term of an (n, k) weight on a device."""
        for name, factor in zip(self._fields, self, strict=True):
            if isinstance(factor, QuantTensor):
                if factor.format.more_terms:
                    raise ValueError(f"{name} must have no {factor.format.more_terms} of its own")
            elif not isinstance(factor, Tensor):
                raise TypeError(
                    f"{name} must be a torch.Tensor or a QuantTensor, got {type(factor).__name__}"
                )
            elif factor.dtype not in DTYPES or factor.dim() != 2:
                raise TypeError(
                    f"{name} must be a matrix in float32, bfloat16 or float16, got {factor.dtype} of shape "
                    f"{tuple(factor.shape)}"
                )
            if factor.device != device:
                raise ValueError(f"{name} must be on {device}, got {factor.device}")
        if isinstance(self.left, QuantTensor) != isinstance(self.right, QuantTensor):
            raise TypeError("left and right must both be dense or both be quantized")
        shapes, r = (tuple(self.left.shape), tuple(self.right.shape)), self.rank
        if shapes != ((n, r), (r, k)):
            raise ValueError(
                f"left and right of a ({n}, {k}) weight must be ({n}, r) and (r, {k}), got {shapes[0]} and "
                f"{shapes[1]}"
            )
