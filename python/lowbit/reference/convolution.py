"""Convolutions as products of matrices: the patches of x, and where the filters of torch lie as rows of a matrix.

A patch holds the C / groups channels of each tap of a filter, tap by tap: in channels_last memory these are runs. So
K = taps * C / groups, and a filter (C / groups, *kernel) is the row that it gives in that order. A transposed
convolution multiplies pixels instead: K = C, and a row for each tap of each of its N / groups outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Geometry(NamedTuple):
    """What a convolution is apart from its numbers; of D spatial dimensions.

    Attributes:
        kernel_size, stride, dilation: (D,).
        padding: (2 D,), zeros before and after each dimension, in the order of the dimensions.
        groups: of channels.
        output_padding: (D,), of a transposed convolution, else empty.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1
    output_padding: Sequence[int] = ()

    @property
    def dims(self) -> int:
        """D."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Elements of a filter for one channel."""
        return math.prod(self.kernel_size)

    @property
    def pointwise(self) -> bool:
        """Whether a patch is one pixel, without padding."""
        return self.taps == 1 and not any(self.padding)

    def pairs(self) -> list[tuple[int, int]]:
        """The padding before and after each dimension."""
        return [(self.padding[2 * i], self.padding[2 * i + 1]) for i in range(self.dims)]

    def out_size(self, size: Sequence[int]) -> list[int]:
        """The spatial size of the result of a convolution of x of this spatial size; below 1 where x is too small."""
        return [
            (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, (before, after), dilation in zip(
                size, self.kernel_size, self.stride, self.pairs(), self.dilation, strict=True
            )
        ]


def patches(x: Tensor, g: Geometry) -> Tensor:  # (B, *out, groups, K)
    """The patches of x (B, C, *size), copied into one tensor unless a patch is one pixel."""
    if any(g.padding):
        x = F.pad(x, [p for pair in reversed(g.pairs()) for p in pair])
    b, c, dims = x.shape[0], x.shape[1], g.dims
    for i in range(dims):
        extent = g.dilation[i] * (g.kernel_size[i] - 1) + 1
        x = x.unfold(2 + i, extent, g.stride[i])[..., :: g.dilation[i]]
    out = x.shape[2 : 2 + dims]
    # (B, groups, C / groups, *out, *kernel) to (B, *out, groups, *kernel, C / groups)
    x = x.unflatten(1, (g.groups, c // g.groups))
    order = [0, *range(3, 3 + dims), 1, *range(3 + dims, 3 + 2 * dims), 2]
    return x.permute(order).reshape(b, *out, g.groups, g.taps * (c // g.groups))


def to_rows(weight: Tensor) -> Tensor:  # (N, K)
    """The matrix of filters (N, C / groups, *kernel), as torch has them; a view where their memory allows it."""
    return weight.movedim(1, -1).flatten(1)


def to_filters(rows: Tensor, kernel_size: Sequence[int]) -> Tensor:  # (N, C / groups, *kernel)
    """Inverse of `to_rows`, a view."""
    channels = rows.shape[1] // math.prod(kernel_size)
    return rows.unflatten(1, (*kernel_size, channels)).movedim(-1, 1)


def to_transposed_rows(weight: Tensor) -> Tensor:  # (taps * N / groups, C)
    """The matrix of a transposed convolution's weight (C, N / groups, *kernel)."""
    return weight.movedim((0, 1), (-1, -2)).flatten(0, -2)


def to_transposed_filters(rows: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Inverse of `to_transposed_rows`, a view (C, N / groups, *kernel)."""
    outputs = rows.shape[0] // math.prod(kernel_size)
    return rows.unflatten(0, (*kernel_size, outputs)).movedim((-1, -2), (0, 1))


def convolution(
    x: Tensor, rows: Tensor, bias: Tensor | None, g: Geometry
) -> Tensor:  # (B, N, *out), fp32
    """The convolution of x (B, C, *size) in fp32 by torch, with the matrix of its filters."""
    # Not in the memory of rows, which torch would take for channels_last and answer so.
    weight = to_filters(rows.float(), g.kernel_size).contiguous()
    bias = None if bias is None else bias.float()
    pairs = g.pairs()
    if any(before != after for before, after in pairs):
        x = F.pad(x, [p for pair in reversed(pairs) for p in pair])
        pairs = [(0, 0)] * g.dims
    padding = [before for before, _ in pairs]
    made: Tensor = _CONVOLUTIONS[g.dims - 1](  # type: ignore[operator]
        x.float(), weight, bias, list(g.stride), padding, list(g.dilation), g.groups
    )
    return made


def transposed_convolution(
    x: Tensor, rows: Tensor, bias: Tensor | None, g: Geometry
) -> Tensor:  # (B, N, *out), fp32
    """The transposed convolution of x (B, C, *size) in fp32 by torch, with the matrix of its filters."""
    made: Tensor = _TRANSPOSED[g.dims - 1](  # type: ignore[operator]
        x.float(),
        to_transposed_filters(rows.float(), g.kernel_size).contiguous(),
        None if bias is None else bias.float(),
        list(g.stride),
        [before for before, _ in g.pairs()],
        list(g.output_padding),
        g.groups,
        list(g.dilation),
    )
    return made


def sum_of_taps(taps: Tensor, g: Geometry) -> Tensor:  # (B, *out, N)
    """Adds what every pixel gives to the result of a transposed convolution, its padding cut off.

    Args:
        taps: (B, *size, taps, N), for each tap what it adds at the pixel's place.
        g: its geometry.
    """
    size, kernel = taps.shape[1 : 1 + g.dims], g.kernel_size
    spans = [(length - 1) * s + 1 for length, s in zip(size, g.stride, strict=True)]
    full = [
        span + d * (k - 1) + more
        for span, k, d, more in zip(spans, kernel, g.dilation, g.output_padding, strict=True)
    ]
    total = taps.new_zeros(taps.shape[0], *full, taps.shape[-1])
    for tap, at in enumerate(itertools.product(*map(range, kernel))):
        window = [slice(None)]
        window += [
            slice(i * d, i * d + span, s)
            for i, d, span, s in zip(at, g.dilation, spans, g.stride, strict=True)
        ]
        total[tuple(window)] += taps.select(-2, tap)
    inside = [slice(None)]
    inside += [
        slice(before, length - after)
        for (before, after), length in zip(g.pairs(), full, strict=True)
    ]
    return total[tuple(inside)]
