"""What quantization took from a weight: W - W^, slice by slice, and its norms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit import reference
from lowbit.methods import grid
from lowbit.weights.quantized import QuantTensor


@torch.no_grad()
def errors(weight: Tensor, qt: QuantTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of rows of a weight, fp32, and their errors W - W^, fp64."""
    scales = reference.effective_scales(qt)
    for rows, w in grid.slices(weight):
        yield w, (w - reference.dequantize_rows(qt, rows, scales)).double()


def norms(weight: Tensor, qt: QuantTensor) -> tuple[float, float]:
    """||W - W^|| / ||W||, Frobenius norms, and the largest |W - W^|."""
    square = norm = largest = 0.0
    for w, error in errors(weight, qt):
        square += float(error.square().sum())
        norm += float(w.double().square().sum())
        largest = max(largest, float(error.abs().max()))
    return math.sqrt(square / norm) if norm else math.inf if square else 0.0, largest


def output_norm(weight: Tensor, qt: QuantTensor, hessian: Tensor) -> float:
    """||X (W - W^)^T|| / ||X W^T|| of inputs X with X^T X = `hessian` (K, K), up to a factor."""
    h = hessian.to(weight.device, torch.float64)
    error = norm = 0.0
    for w, e in errors(weight, qt):
        dense = w.double()
        error += float(((e @ h) * e).sum())
        norm += float(((dense @ h) * dense).sum())
    return math.sqrt(max(error, 0.0) / norm) if norm > 0 else math.inf if error > 0 else 0.0
