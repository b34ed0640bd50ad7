"""The kernels of convolutions on the CPU. No maths and no checks, as in `weights.py`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import ACTIVATIONS, CODES, bound, of_bias
from lowbit.layouts import Operands
from lowbit.reference import Geometry
from lowbit.strides import address, contiguous

isa: str = _C.grouped_conv_isa()


def conv(
    x: Tensor,  # (B, C, *size)
    x_scales: Tensor | None,  # (B * pixels,) fp32 contiguous, of int8 x
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    g: Geometry,
    activation: str | None,
    kernel: int = -1,
) -> Tensor:  # (B, N, *out) in channels_last memory, in the dtype of x, of int8 fp32
    """A convolution without groups: every thread gathers a tile of patches at a time."""
    pixels = contiguous(x.movedim(1, -1))
    shape, size = _shape(tuple(x.shape), *map(tuple, g[:4]), 1)
    out = _empty(x, w.n, size)
    _C.conv_ptr(
        bound(w),
        shape,
        x=address(pixels),
        x_dtype=CODES[x.dtype],
        x_scales=address(x_scales),
        **of_bias(bias),
        activation=ACTIVATIONS[activation],
        out=address(out.movedim(1, -1)),
        out_dtype=CODES[out.dtype],
        threads=torch.get_num_threads(),
        kernel=kernel,
    )
    return out


def grouped_conv(
    x: Tensor,  # (B, C, *size)
    w: Operands,
    bias: Tensor | None,  # (N,) contiguous
    g: Geometry,
    activation: str | None,
    isa: str = "",
) -> Tensor:  # (B, N, *out) in channels_last memory, in the dtype of x
    """A convolution with groups, in fp32 with the decoded weight; `isa` caps the instruction set as LOWBIT_ISA does."""
    pixels = contiguous(x.movedim(1, -1))
    if not w.n == x.shape[1] == g.groups:
        pixels = pixels.float()
    shape, size = _shape(tuple(x.shape), *map(tuple, g[:4]), g.groups)
    out = _empty(x, w.n, size)
    _C.grouped_conv_ptr(
        bound(w),
        shape,
        x=address(pixels),
        x_dtype=CODES[pixels.dtype],
        **of_bias(bias),
        activation=ACTIVATIONS[activation],
        out=address(out.movedim(1, -1)),
        out_dtype=CODES[out.dtype],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out


def _empty(x: Tensor, n: int, size: tuple[int, ...]) -> Tensor:
    shape = (x.shape[0], n, *size)
    strides = [1] * len(shape)
    length = n
    for i in (*range(len(shape) - 1, 1, -1), 0):
        strides[i] = length
        length *= shape[i]
    dtype = torch.float32 if x.dtype == torch.int8 else x.dtype
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


@functools.lru_cache(4096)
def _shape(
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[_C.ConvShape, tuple[int, ...]]:  # and the spatial size of the result
    g = Geometry(kernel, stride, padding, dilation, groups)
    out = tuple(g.out_size(x[2:]))
    front = (0,) * (3 - g.dims)
    ones = (1,) * len(front)
    shape = _C.ConvShape(
        batch=x[0],
        channels=x[1],
        groups=groups,
        size=(*ones, *x[2:]),
        kernel=(*ones, *kernel),
        stride=(*ones, *stride),
        before=(*front, *(before for before, _ in g.pairs())),
        dilation=(*ones, *dilation),
        out=(*ones, *out),
    )
    return shape, out
