"""Convolutions with a quantized weight: lowbit::conv, and `conv`, which calls it.

The matrix of the weight is that of `reference.convolution`. A kernel gathers tiles of patches as it goes; where there
is none, and for gradients, the patches are made in memory and multiplied by `lowbit.linear`. With groups of channels
the weight is small: it is decoded to fp32 in every call. A transposed convolution is a product with the pixels of x,
of which the results are added up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from lowbit import backends, modes, reference
from lowbit.layouts import Added, Operands
from lowbit.ops import checks, library
from lowbit.ops.int8 import call_static_linear
from lowbit.ops.linear import autocast, call_linear
from lowbit.ops.terms import Weight, terms
from lowbit.ops.weights import call_dequantize
from lowbit.reference.convolution import Geometry
from lowbit.strides import contiguous

_LETTERS = "DHW"


def conv(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """activation(conv(x, W) + bias) with a quantized weight, rounded once, as torch.nn.functional.conv2d.

    Args:
        x: (B, C, *size) in fp32, bf16 or fp16 with one to three spatial dimensions; channels_last is fastest.
        weight: (N, C / groups * taps), a filter a row, tap by tap (`reference.to_rows`).
        bias: (N,) in fp32, bf16 or fp16.
        kernel_size: (D,), of as many numbers as x has spatial dimensions.
        stride, dilation: (D,), or one number for all.
        padding: zeros on both sides of each dimension, (D,) or one number, or before and after each, (2 D,).
        groups: of channels, which do not meet each other.
        activation: None, "relu", "silu", "gelu" or "gelu_tanh".

    Returns:
        (B, N, *out) in the dtype of x, and in channels_last memory if x is. With gradients for x, the bias and what
        is learnable of the weight.

    Raises:
        TypeError, ValueError, NotImplementedError: a dtype, shape or number does not fit, or the format quantizes
            activations and there are groups.

    Example:
        >>> rows = lowbit.reference.to_rows(torch.randn(8, 3, 3, 3))
        >>> conv(torch.randn(1, 3, 5, 5), lowbit.quantize(rows, "nf4"), kernel_size=(3, 3), padding=1).shape
        torch.Size([1, 8, 5, 5])
    """
    w, others = terms(weight)
    checks.check_optional(bias=bias)
    dims = len(kernel_size)
    pads = _numbers("padding", padding, dims, 2 * dims)
    geometry = Geometry(
        tuple(kernel_size),
        _numbers("stride", stride, dims),
        pads if len(pads) == 2 * dims else tuple(p for p in pads for _ in range(2)),
        _numbers("dilation", dilation, dims),
        groups,
    )
    return call_conv(x, w, bias, geometry, *others, activation=activation)


def _numbers(name: str, given: Sequence[int] | int, *lengths: int) -> tuple[int, ...]:
    if isinstance(given, int):
        return (given,) * lengths[0]
    if len(given) not in lengths:
        raise ValueError(f"{name} must have {' or '.join(map(str, lengths))} numbers, got {given}")
    return tuple(given)


def call_conv(
    x: Tensor,
    w: Operands,
    bias: Tensor | None,
    g: Geometry,
    *others: Added,
    activation: str | None = None,
    x_scale: Tensor | None = None,
    takes_int8: bool | None = None,
) -> Tensor:
    """`conv` on the terms of a weight.

    Args:
        x, w, bias, g, activation: as there.
        others: further terms of the weight.
        x_scale: () fp32, positive: x is quantized to int8 by it.
        takes_int8: whether the format quantizes activations, for callers that know: torch.compile cannot ask it.
    """
    x = autocast(x)
    if x_scale is not None:
        return _static(x, x_scale, w, bias, g, activation)
    learned = checks.requires_grad(w.scales, w.zeros, w.table)
    derives = torch.is_grad_enabled() and (learned or checks.requires_grad(x, bias))
    if not (others or derives or (not torch.compiler.is_compiling() and modes.active())):
        return _conv(x, None, *w, bias, *_flat(g), activation)
    if not torch.compiler.is_compiling():
        _check(x, w, bias, g, activation)
    takes_int8 = w.format.activation is not None if takes_int8 is None else takes_int8
    if g.groups == 1 and (others or learned or takes_int8):
        rows = reference.patches(x, g).squeeze(-2)
        y = _channels_first(call_linear(rows, w, bias, *others), x)
    else:
        with checks.no_autocast(x.device.type):
            rows = _dense(w, others, learned)
            y = _in_order(reference.convolution(x, rows, bias, g).to(x.dtype), x)
    return reference.apply_epilogue(y, activation, None, None)


def _dense(w: Operands, others: Sequence[Added], learned: bool) -> Tensor:  # (N, K) fp32
    """The weight; where something of it may learn, a product with the identity, which is the same bit for bit."""
    if not (others or learned):
        return call_dequantize(w, torch.float32)
    identity = torch.eye(w.k, dtype=torch.float32, device=w.codes.device)
    return call_linear(identity, w, None, *others).t()


# Nodes of torch.fx graphs, as `call_linear`.
torch.fx.wrap("call_conv")


def _static(
    x: Tensor,
    x_scale: Tensor,
    w: Operands,
    bias: Tensor | None,
    g: Geometry,
    activation: str | None,
) -> Tensor:
    pixels = x.movedim(1, -1)
    rows = pixels.reshape(-1, x.shape[1])
    scales = x_scale.expand(rows.shape[0]).contiguous()
    q, scales = torch.ops.lowbit.int8_quantize.default(rows, None, scales)
    y = _conv(q.view(pixels.shape).movedim(-1, 1), scales, *w, bias, *_flat(g), activation)
    # q is in channels_last memory, and so is y.
    return _in_order(y.to(x.dtype), x)


def call_conv_transpose(
    x: Tensor,
    w: Operands,
    bias: Tensor | None,
    g: Geometry,
    *others: Added,
    x_scale: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.conv_transpose2d, and so on, with the terms of a quantized weight.

    Args:
        x: (B, C, *size) in fp32, bf16 or fp16.
        w: (taps * N / groups, C), `reference.to_transposed_rows`.
        bias: (N,).
        g: with an output_padding.
        others: further terms of the weight.
        x_scale: as in `call_conv`.

    Returns:
        (B, N, *out) in the dtype of x, rounded once.
    """
    x = autocast(x)
    checks.check_float("x", x.dtype)
    if not torch.compiler.is_compiling():
        _check_input(x, w.k, g)
        _check_groups(w, g)
    if bias is not None:
        checks.check_bias(bias, w.n // g.taps * g.groups, x.device)
    with checks.no_autocast(x.device.type):
        if g.groups > 1:
            learned = checks.requires_grad(w.scales, w.zeros, w.table)
            rows = _dense(w, others, learned)
            return _in_order(reference.transposed_convolution(x, rows, bias, g).to(x.dtype), x)
        pixels = x.movedim(1, -1).float()
        if x_scale is None:
            taps = call_linear(pixels, w, None, *others)
        else:
            taps = call_static_linear(pixels, x_scale, w, None)
        y = reference.sum_of_taps(taps.unflatten(-1, (g.taps, w.n // g.taps)), g)
        return _channels_first((y if bias is None else y + bias.float()).to(x.dtype), x)


torch.fx.wrap("call_conv_transpose")


def _flat(g: Geometry) -> tuple[Any, ...]:
    return list(g.kernel_size), list(g.stride), list(g.padding), list(g.dilation), g.groups


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def _channels_first(y: Tensor, x: Tensor) -> Tensor:
    """(B, *out, N) as (B, N, *out) in the order of x; no view: models write to it, and flatten it by a view."""
    if _channels_last(x):
        return y.contiguous().movedim(-1, 1).clone()
    return y.movedim(-1, 1).clone(memory_format=torch.contiguous_format)


def _in_order(y: Tensor, x: Tensor) -> Tensor:
    dense = y.movedim(1, -1) if _channels_last(x) else y
    return y if dense.is_contiguous() else _channels_first(y.movedim(1, -1), x)


def _check_input(x: Tensor, channels: int, g: Geometry) -> None:
    _check_numbers(*map(tuple, g[:4]))
    dims = len(g.kernel_size)
    if x.dim() != dims + 2 or x.shape[1] != channels:
        shape = ", ".join(["B", str(channels), *_LETTERS[-dims:]])
        raise ValueError(f"x must have shape ({shape}), got {tuple(x.shape)}")


@functools.lru_cache(4096)
def _check_numbers(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> None:
    dims = len(kernel_size)
    if not 1 <= dims <= 3:
        raise ValueError(f"kernel_size must have 1 to 3 numbers, got {kernel_size}")
    for name, least, given, length in (
        ("kernel_size", 1, kernel_size, dims),
        ("stride", 1, stride, dims),
        ("dilation", 1, dilation, dims),
        ("padding", 0, padding, 2 * dims),
    ):
        if len(given) != length or any(value < least for value in given):
            raise ValueError(f"{name} must be {length} numbers of at least {least}, got {given}")


def _check(
    x: Tensor, w: Operands, bias: Tensor | None, g: Geometry, activation: str | None
) -> list[int]:
    """Checks what `conv` takes, and gives the spatial size of its result."""
    if x.dtype != torch.int8:
        checks.check_float("x", x.dtype)
    taps = math.prod(g.kernel_size)
    if g.groups < 1 or w.n % g.groups:
        raise ValueError(f"groups must divide the {w.n} filters, got {g.groups}")
    if w.k % taps:
        raise ValueError(
            f"weight must have columns for each of the {taps} taps of kernel_size {tuple(g.kernel_size)}, "
            f"got {w.k}"
        )
    _check_input(x, w.k // taps * g.groups, g)
    out = g.out_size(x.shape[2:])
    if any(isinstance(size, int) and size < 1 for size in out):
        raise ValueError(
            f"x must be at least as large as a filter of kernel_size {tuple(g.kernel_size)} and dilation "
            f"{tuple(g.dilation)}, got {tuple(x.shape[2:])} with padding {tuple(g.padding)}"
        )
    if activation not in checks.ACTIVATIONS:
        raise ValueError(f"activation must be one of {checks.ACTIVATIONS}, got {activation!r}")
    _check_groups(w, g)
    if bias is not None:
        checks.check_bias(bias, w.n, x.device)
    return out


def _check_groups(w: Operands, g: Geometry) -> None:
    if g.groups > 1 and w.format.activation is not None:
        raise NotImplementedError(
            f"a convolution with groups takes activations as they are, got format {w.format.name!r}: "
            "leave out its suffix"
        )


def _checked(
    x: Tensor,
    x_scales: Tensor | None,
    w: Operands,
    bias: Tensor | None,
    g: Geometry,
    activation: str | None,
) -> list[int]:
    checks.refuse_grad("conv", x, *w.tensors, bias)
    pixels = x.shape[0] * math.prod(x.shape[2:])
    quantized = x.dtype == torch.int8
    if quantized != (x_scales is not None):
        raise ValueError(f"x_scales must be given with int8 x and only then, got x in {x.dtype}")
    if quantized and w.format.activation is None:
        raise ValueError(f"int8 x needs a format with int8 activations, got {w.format.name!r}")
    if x_scales is not None and (
        x_scales.dtype != torch.float32
        or x_scales.shape != (pixels,)
        or x_scales.device != x.device
    ):
        raise ValueError(
            f"x_scales must be float32 of shape ({pixels},) on {x.device}, got {x_scales.dtype} of "
            f"shape {tuple(x_scales.shape)} on {x_scales.device}"
        )
    out = _check(x, w, bias, g, activation)
    checks.check_weight(w, None if x.is_cpu else x.device)
    return out


def _empty(x: Tensor, w: Operands, out: Sequence[int]) -> Tensor:
    """(B, N, *out) in the order of x; of int8 x fp32."""
    dtype = torch.float32 if x.dtype == torch.int8 else x.dtype
    made = x.new_empty((x.shape[0], *out, w.n), dtype=dtype)
    return _channels_first(made, x)


def _impl(
    x: Tensor,
    x_scales: Tensor | None,
    w: Operands,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
) -> Tensor:
    g = Geometry(kernel_size, stride, padding, dilation, groups)
    out = _checked(x, x_scales, w, bias, g, activation)
    if not (x.shape[0] and w.n):
        return _empty(x, w, out)
    backend = backends.find(x.device.type, w.layout)
    y = backend.conv(x, contiguous(x_scales), w, contiguous(bias), g, activation)
    return _in_order(y, x)


def _fake(
    x: Tensor, x_scales: Tensor | None, w: Operands, bias: Tensor | None, *args: Any
) -> Tensor:
    *geometry, activation = args
    g = Geometry(*geometry)
    return _empty(x, w, _checked(x, x_scales, w, bias, g, activation))


_conv = library.op(
    "conv",
    "(Tensor x, Tensor? x_scales, {W}, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, str? activation) -> Tensor",
    _impl,
    _fake,
)
