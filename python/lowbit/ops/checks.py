"""What the ops accept: each check once, with the name and the value in the message.

Kernels read exactly the bytes that `Layout.specs` gives, so nothing here may be skipped.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import layouts, modes
from lowbit.formats import Format, parse
from lowbit.layouts.operands import TENSORS, Operands

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)
OUTLIER_DTYPES = (torch.float16, torch.float32)
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")


def check_tensors(**given: object) -> None:
    """Raises TypeError unless every argument, given by its name, is a tensor: lists and arrays are none."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_optional(**given: object) -> None:
    """`check_tensors` for arguments that may be None."""
    check_tensors(**{name: value for name, value in given.items() if value is not None})


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors requires grad."""
    for t in tensors:  # noqa: SIM110 (half the time of any())
        if t is not None and t.requires_grad:
            return True
    return False


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Raises ValueError if autograd would expect gradients of `op`, which has none; NotImplementedError if forward-mode
    AD would expect tangents.
    """
    if torch.is_grad_enabled() and requires_grad(*tensors):
        raise ValueError(
            f"lowbit::{op} has no gradients and an input requires grad: "
            "use lowbit::linear_trainable, or call it under torch.no_grad()"
        )
    if modes.in_dual_level() and any(t is not None and modes.has_tangent(t) for t in tensors):
        raise NotImplementedError(
            f"lowbit::{op} has no derivatives and an input has a tangent (forward-mode AD)"
        )


_LEARNABLE = ("scales", "zeros", "table")


class _Expected(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    or_fp32: bool  # learnable scales and zeros are rounded to `dtype` but kept in fp32


@functools.lru_cache(maxsize=4096)
def _expected(
    spec: str, layout: str, n: int, k: int
) -> tuple[Format, tuple[_Expected | None, ...]]:
    """The format, and what the tensors of the operands must be, None where there is none."""
    if k < 1 or n < 0:
        raise ValueError(f"weight must have n >= 0 and k >= 1, got ({n}, {k})")
    format = parse(spec)
    if more := format.more_terms:
        raise ValueError(
            f"format {format.name!r} has {more}: operands are those of the quantized matrix alone, and "
            "another op multiplies the other term"
        )
    if not layouts.find(layout).fits(format):
        raise ValueError(f"format {format.name!r} does not fit the layout {layout!r}")
    specs = layouts.find(layout).specs(format, n, k)
    return format, tuple(
        _Expected(name, *specs[name], name in _LEARNABLE and specs[name][1].is_floating_point)
        if name in specs
        else None
        for name in TENSORS
    )


def check_weight(w: Operands, device: torch.device | None) -> Format:
    """Checks the tensors of a weight; `device` None says that all are on the CPU."""
    n, k = w.n, w.k
    if not (isinstance(n, int) and isinstance(k, int)):
        return w.format  # symbolic: the shapes are checked where they are numbers
    format, expected = _expected(w.spec, w.layout, n, k)
    for t, want in zip(w, expected):  # noqa: B905 (the tensors are the first fields)
        if t is None or want is None:
            if t is not want:
                _fail_weight(w, format, device, expected)
        elif (
            t.shape != want[1]  # type: ignore[union-attr]
            or (t.dtype is not want[2] and not (want[3] and t.dtype is torch.float32))  # type: ignore[union-attr]
            or not t.is_contiguous()  # type: ignore[union-attr]
            or (device is not None and t.device != device)  # type: ignore[union-attr]
        ):
            _fail_weight(w, format, device, expected)
    return format


def _fail_weight(
    w: Operands, format: Format, device: torch.device | None, expected: tuple[_Expected | None, ...]
) -> None:
    """Says what `check_weight` found."""
    tensors = w[: len(TENSORS)]
    given = [name for name, t in zip(TENSORS, tensors, strict=True) if t is not None]
    wanted = [want.name for want in expected if want is not None]
    if given != wanted:
        raise ValueError(
            f"format {format.name!r} in layout {w.layout!r} takes the operands {wanted}, got {given}"
        )
    for t, want in zip(tensors, expected, strict=True):
        if want is None or not isinstance(t, Tensor):
            continue
        if device is not None and t.device != device:
            raise ValueError(f"{want.name} must be on {device}, got {t.device}")
        dtypes = {want.dtype, torch.float32} if want.or_fp32 else {want.dtype}
        if t.shape != want.shape or t.dtype not in dtypes or not t.is_contiguous():
            raise ValueError(
                f"{want.name} of a {w.shape} weight in format {format.name!r} and layout "
                f"{w.layout!r} must be a contiguous {want.dtype} of shape {want.shape}, got "
                f"{t.dtype} of shape {tuple(t.shape)} and strides {t.stride()}"
            )


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Outside of autocast, which would round what is computed in fp32."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless `dtype` is one that kernels compute with."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def check_bias(bias: Tensor, n: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless the bias is a float (n,) on the device."""
    check_float("bias", bias.dtype)
    if bias.dim() != 1 or bias.shape[0] != n or bias.device != device:
        raise ValueError(
            f"bias must have shape ({n},) on {device}, got {tuple(bias.shape)} on {bias.device}"
        )


def check_linear(
    x: Tensor, w: Operands, bias: Tensor | None, added: Tensor | None = None
) -> Format:
    """Checks all tensors of a linear and returns the format."""
    if x.dtype not in FLOAT_DTYPES:
        check_float("x", x.dtype)
    if x.dim() == 0 or x.shape[-1] != w.k:
        raise ValueError(f"x must have shape (..., {w.k}), got {tuple(x.shape)}")
    if bias is not None:
        check_bias(bias, w.n, x.device)
    if added is not None and (
        added.dtype != torch.float32
        or added.shape != (*x.shape[:-1], w.n)
        or added.device != x.device
    ):
        raise ValueError(
            f"added must be float32 of shape {(*x.shape[:-1], w.n)} on {x.device}, got {added.dtype} of shape "
            f"{tuple(added.shape)} on {added.device}"
        )
    # The dispatcher calls a CPU kernel only if every tensor is on the CPU.
    return check_weight(w, None if x.is_cpu else x.device)


def check_sparse(columns: Tensor, values: Tensor, k: int, device: torch.device) -> None:
    """Checks dtypes, shapes and devices of a sparse term, P = 0 included; what multiplies it looks at the columns."""
    if columns.dtype != torch.int32 or values.dtype not in OUTLIER_DTYPES:
        raise TypeError(
            f"outlier_columns must be int32 and outlier_values one of {OUTLIER_DTYPES}, got "
            f"{columns.dtype} and {values.dtype}"
        )
    shape = columns.shape
    if len(shape) != 2 or shape[1] > k or values.shape != shape:
        raise ValueError(
            f"outlier_columns and outlier_values must have the shape (N, P) with P at most {k}, "
            f"got {tuple(shape)} and {tuple(values.shape)}"
        )
    for name, t in (("outlier_columns", columns), ("outlier_values", values)):
        if t.device != device or not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous on {device}, got strides {t.stride()} on {t.device}"
            )


def check_epilogue(
    x: Tensor, n: int, activation: str | None, gate: Tensor | None, residual: Tensor | None
) -> None:
    """Checks what follows a linear of x with n output features."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    for name, t in (("gate", gate), ("residual", residual)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        if t.shape != (*x.shape[:-1], n) or t.device != x.device:
            raise ValueError(
                f"{name} must have shape {(*x.shape[:-1], n)} on {x.device}, "
                f"got {tuple(t.shape)} on {t.device}"
            )


def check_indices(indices: Tensor) -> None:
    """Checks the dtype of embedding indices; their range is looked at where they have values."""
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")


def check_codes(codes: Tensor, spec: str) -> Format:
    """Checks shape and dtype of codes to pack and returns the format, whose codes stand for one weight each."""
    format = _scalar(spec)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(
            f"codes must be 2-D uint8, got {codes.dtype} of shape {tuple(codes.shape)}"
        )
    return format


def _scalar(spec: str) -> Format:
    format = parse(spec)
    if format.dim > 1:
        raise ValueError(
            f"format {format.name!r} has codes of {format.dim} weights: this op takes a code per weight"
        )
    return format


def check_packed(packed: Tensor, spec: str, k: int) -> Format:
    """Checks shape and dtype of canonical bytes of k codes a row and returns the format."""
    format = _scalar(spec)
    row_bytes = format.row_bytes(k) if k >= 0 else -1
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes:
        raise ValueError(
            f"packed must be uint8 of shape (N, {row_bytes}) for k = {k} in format "
            f"{format.name!r}, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    return format
