"""Backward of lowbit::linear_trainable and linear_outliers_trainable; `ops.py` registers it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowbit import outliers


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `backward` needs: x only for gradients of the weight."""
    x, codes, scales, zeros, table, bias, *rest = inputs
    ctx.meaning, sparse = rest[:4], rest[4:]
    wants_weight = any(ctx.needs_input_grad[2:5])
    ctx.save_for_backward(x if wants_weight else None, codes, scales, zeros, table, *sparse)
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As in a dense layer of the dtype of x: dx is computed with the weight rounded to it."""
    x, *weight = ctx.saved_tensors
    weight, sparse = weight[:4], weight[4:]
    needs = ctx.needs_input_grad
    n, k = ctx.meaning[2:]
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = grad @ outliers.dequantize(weight, ctx.meaning, ctx.x_dtype, *sparse)
    if needs[5]:
        grad_bias = grad.reshape(-1, n).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    terms: tuple[Tensor | None, ...] = (None, None, None)
    wanted = list(needs[2:5])
    if any(wanted):
        rows, x_rows = grad.reshape(-1, n).float(), x.reshape(-1, k).float()
        with _no_autocast(grad.device.type):
            grad_weight = rows.t() @ x_rows
        made = torch.ops.lowbit.codebook_grad(grad_weight, *weight, *ctx.meaning, wanted)
        terms = tuple(g if want else None for g, want in zip(made, wanted, strict=True))
    return grad_x, None, *terms, grad_bias, *(None for _ in (*ctx.meaning, *sparse))


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
