"""PatchConv2d: a convolution as a linear of patches, for linears that quantize each row of x, and that train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.nn.conv import SHAPE, check_dense, rows_of
from lowbit.nn.leaf import Proxy, node_of
from lowbit.ops import checks
from lowbit.reference import to_filters

_GEOMETRY = (*SHAPE, "transposed")


class PatchConv2d(nn.Module):
    """y[b, :, i, j] = linear(patch of x at i, j): the patches take memory for as long as the call lasts.

    Attributes:
        linear: takes patches (..., K), tap by tap (`lowbit.reference.to_rows`), to (..., N).
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as in nn.Conv2d.
    """

    def __init__(self, conv: nn.Conv2d, linear: nn.Module) -> None:
        """Makes a layer of the geometry of `conv` that multiplies by `linear`.

        Raises:
            TypeError: `conv` is not an nn.Conv2d.
            NotImplementedError: it has groups, or is a subclass that computes something else.
        """
        check_dense(conv, nn.Conv2d)
        if conv.groups != 1:
            raise NotImplementedError(f"groups must be 1, got {conv.groups}")
        super().__init__()
        vars(self).update({name: getattr(conv, name) for name in _GEOMETRY})
        self.linear = linear
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """(N, C, R, S), that of the linear as it has it."""
        own: Any = self
        return to_filters(own.linear.weight, own.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) or (C, H, W) gives (B, N, H', W') or (N, H', W')."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        y = self.linear(rows_of(self, x).squeeze(-2)).movedim(-1, 1)
        # No view, and in the order of nn.Conv2d: models write to it in place, and flatten it by a view.
        y = y.clone(memory_format=torch.contiguous_format)
        return y[0] if x.dim() == 3 else y

    def extra_repr(self) -> str:
        """The geometry."""
        own: Any = self
        return (
            f"kernel_size={own.kernel_size}, stride={own.stride}, padding={own.padding}, "
            f"dilation={own.dilation}, padding_mode={own.padding_mode}"
        )
