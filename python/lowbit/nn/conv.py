"""QuantConv2d: a 2-D convolution as a linear layer of patches (im2col), for kernels that multiply matrices.

    y[b, n, i, j] = linear(patch[b, i, j])[n], patch = the C * R * S inputs under the filter, channel by channel
A 1x1 filter reads the pixels themselves, without patches. R x S is the size of the filter, C and N count channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.formats import Format
from lowbit.methods import quantize
from lowbit.nn.leaf import Proxy, node_of
from lowbit.nn.linear import QuantLinear
from lowbit.nn.weight import HasPackedWeight
from lowbit.ops import checks
from lowbit.strides import shaped

Size = tuple[int, ...]
_PAD_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


class QuantConv2d(HasPackedWeight):
    """A convolution whose weight is quantized, as an (N, C * R * S) matrix.

    The patches take R * S times the memory of the input, for as long as the call lasts.

    Attributes:
        linear: what multiplies the patches, a QuantLinear. Its scales and tables can be learned
            (`QuantLinear.train_parameters`).
        kernel_size, stride, dilation: as in nn.Conv2d.
        padding: left, right, top, bottom.
        padding_mode: as in nn.Conv2d.
        weight: (N, C, R, S), stands for the dense weight (`lowbit.nn.weight.PackedWeight`); that of a linear which
            trains is as the linear has it.
    """

    linear: Any

    def __init__(
        self,
        linear: nn.Module,
        kernel_size: Size,
        stride: Size = (1, 1),
        padding: Size = (0, 0, 0, 0),
        dilation: Size = (1, 1),
        padding_mode: str = "zeros",
    ) -> None:
        """Makes a layer of one that takes patches (..., C * R * S) to (..., N)."""
        super().__init__()
        if padding_mode not in _PAD_MODES:
            raise ValueError(f"padding_mode must be one of {[*_PAD_MODES]}, got {padding_mode!r}")
        self.linear = linear
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode

    @classmethod
    def like(cls, conv: nn.Conv2d, linear: nn.Module) -> QuantConv2d:
        """Makes a layer of the geometry of `conv` that multiplies by `linear`.

        Raises:
            TypeError: `conv` is not an nn.Conv2d.
            NotImplementedError: it has groups, or is a subclass that computes something else.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if type(conv).forward is not nn.Conv2d.forward:
            raise NotImplementedError(
                f"conv is a {type(conv).__name__}, whose forward is not that of nn.Conv2d"
            )
        if conv.groups != 1:
            raise NotImplementedError(f"groups must be 1, got {conv.groups}")
        made = cls(
            linear, conv.kernel_size, conv.stride, _pads(conv), conv.dilation, conv.padding_mode
        )
        return made.train(conv.training)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, format: Format | str, method: str | None = None
    ) -> QuantConv2d:
        """Quantizes the weight of a dense convolution, each filter a row; the bias is shared.

        Raises:
            TypeError, ValueError, NotImplementedError: as `like` and `lowbit.quantize`.
        """
        made = cls.like(conv, nn.Identity())
        weight = quantize(conv.weight.detach().flatten(1), format, method)
        made.linear = QuantLinear.from_quant_tensor(weight, conv.bias).train(conv.training)
        made.set_weight_dtype(conv.weight.dtype)
        return made

    @property
    def bias(self) -> nn.Parameter | None:
        """(N,), or None."""
        return self.linear.bias  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """As in nn.Conv2d."""
        packed = isinstance(self.linear, HasPackedWeight)
        return super().weight if packed else self._as_filters(self.linear.weight)

    def weight_spec(self) -> tuple[Size, torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        (n, _), dtype, device = self.linear.weight_spec()
        return (n, self._channels, *self.kernel_size), dtype, device

    def weight_source(self) -> Callable[[], Tensor]:
        """What dequantizes the weight of this moment."""
        source = self.linear.weight_source()
        return lambda: self._as_filters(source())

    def learnable_parts(self) -> list[str]:
        """The tensors of the packed weight that require grad."""
        return self.linear.learnable_parts()  # type: ignore[no-any-return]

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype that `weight` stands for, if it is packed."""
        if isinstance(self.linear, HasPackedWeight):
            self.linear.set_weight_dtype(dtype)

    @property
    def _channels(self) -> int:
        return self.linear.in_features // math.prod(self.kernel_size)  # type: ignore[no-any-return]

    def _as_filters(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (self._channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) or (C, H, W) gives (B, N, H', W') or (N, H', W')."""
        if isinstance(x, Proxy):
            return node_of(self, x)
        checks.check_tensors(x=x)
        if x.dim() == 3:
            y = self.forward(x[None])
            return shaped(y, *y.shape[1:])
        channels_last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
        if any(self.padding):
            x = F.pad(x, self.padding, _PAD_MODES[self.padding_mode])
        size = [
            (length - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        if self.kernel_size == (1, 1):
            columns = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, stride=self.stride)
        y = self.linear(columns.transpose(1, 2)).transpose(1, 2).unflatten(2, size)
        # No view, and in the order of nn.Conv2d: models write to it in place, and flatten it by a view.
        order = torch.preserve_format if channels_last else torch.contiguous_format
        return y.clone(memory_format=order)

    def extra_repr(self) -> str:
        """The geometry."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, padding_mode={self.padding_mode}"
        )


def _pads(conv: nn.Conv2d) -> Size:  # left, right, top, bottom
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    pads: list[int] = []
    for axis in (1, 0):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [int(conv.padding[axis])] * 2
    return tuple(pads)
