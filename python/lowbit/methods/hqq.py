"""HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023): zeros
that minimise a norm of the error, sum |W - W^|^p with p < 1, which outliers hardly move.

With the codes q given, the minimum over the zero is found by splitting the error in a sparse part
E and a rest that is small in the squared norm: E = shrink(W - W^), then the zero by least squares.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit import reference
from lowbit.formats import Format, as_format
from lowbit.methods import grid
from lowbit.weights.quantized import QuantTensor

_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: Format | str,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    fit_scale: bool = False,
) -> QuantTensor:
    """Rounds to nearest on a grid whose zeros minimise sum |W - W^|^p, group by group.

    As in the paper: E = sign(e) max(|e| - |e|^(p - 1) / beta, 0) of the error e, zero = mean(q - (W
    - E) / scale), beta grows by `kappa` in each iteration, and the defaults. Interpretation: e is
    measured in units of the group's scale, so that a weight times a constant gives the same codes;
    each group keeps the best grid it has seen, as stored, and the first one is that of round to
    nearest, so no group is worse than there; "min" zeros are the same line; `fit_scale` solves for
    scale and zero together by least squares.

    Args:
        weight: (N, K) as in `rtn.quantize`; computed in fp32.
        format: an affine format with a "float" or "min" zero, as "uint4_zfloat" and "q4_1".
        p: the exponent of the norm, above 0 and at most 1.
        beta, kappa: the weight of the squared part, positive, and its growth, at least 1.
        iterations: at least 0.
        fit_scale: also fit the scales, not in the paper's solver.

    Raises:
        TypeError, ValueError: as `rtn.quantize`; the format has no such zero, or a number is out of
            range.
    """
    format = as_format(format)
    if format.zero not in ("float", "min"):
        raise ValueError(
            f"method 'hqq' fits the zeros of an affine format with zero 'float' or 'min', "
            f"format {format.name!r} has zero {format.zero!r}"
        )
    if format.integer_scales:
        raise ValueError(
            f"method 'hqq' fits the zero of each group, those of format {format.name!r} are codes that share a second "
            "level: use a format with float scales, or method 'rtn'"
        )
    _check_numbers(p, beta, kappa, iterations)
    grid.check_weight(weight, format)
    qt = grid.start(weight, format)
    for rows, w in grid.slices(weight):
        first = 0
        for part in grid.group_parts(w, format):
            groups = slice(first, first + part.shape[1])
            _Lines(qt, rows, groups, part, p).solve(beta, kappa, iterations, fit_scale)
            first = groups.stop
    grid.fill_codes(qt, weight)
    return qt


def _check_numbers(p: float, beta: float, kappa: float, iterations: int) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"p must be above 0 and at most 1, got {p}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 1 <= kappa < float("inf"):
        raise ValueError(f"kappa must be finite and at least 1, got {kappa}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")


class _Lines:
    """The values slope * code + intercept of R groups and how far they are from the weights, fp32."""

    def __init__(self, qt: QuantTensor, rows: slice, groups: slice, part: Tensor, p: float) -> None:
        # Of rows that are one group each.
        self.format = dataclasses.replace(qt.format, group=None)
        self.stored = [qt.tensors[name][rows, groups] for name in ("scales", "zeros")]
        self.scale, self.zero = (t.reshape(-1, 1).to(torch.float32) for t in self.stored)
        self.w, self.p = part.flatten(0, 1), p

    def solve(self, beta: float, kappa: float, iterations: int, fit_scale: bool) -> None:
        """Iterates, and stores the best line of each group."""
        dtype, best_line = self.stored[0].dtype, (self.scale, self.zero)
        best = self._round()
        for i in range(iterations):
            self._step(beta * kappa**i, fit_scale, dtype)
            error = self._round()
            # By more than these errors are rounded; a zero that overflowed its dtype has a NaN error.
            better = error < best * (1 - 2**-18)
            best = torch.where(better, error, best)
            scale, zero = best_line
            best_line = torch.where(better, self.scale, scale), torch.where(better, self.zero, zero)
        for stored, value in zip(self.stored, best_line, strict=True):
            stored.copy_(value.view(stored.shape))

    def _round(self) -> Tensor:  # (R, 1)
        """Codes by the rules of `rtn`, their error in units of the scale, and sum |W - W^|^p."""
        ratio = grid.scaled(
            self.w, self.format, self.scale, self.zero if self.format.zero == "min" else None
        )
        codes = grid.find_codes(ratio, self.format, self.zero, self.scale)
        self.codes = codes.to(torch.float32)
        self.values = reference.apply_scales(self.codes, self.format, self.scale, self.zero)
        self.error = (self.w - self.values).div_(self.scale)
        self.size = self.error.abs()
        # |e|^(p - 1) = |e|^p / |e| is 0^-x for no error: only its product with |e| counts then.
        # By logarithms, to 1e-6: half the time of a pow.
        self.power = self.size.clamp(min=_TINY).log2_().mul_(self.p - 1).exp2_()
        total = (self.size * self.power).sum(1, keepdim=True) * self.scale.abs() ** self.p
        # A group without a scale has nothing to choose.
        return torch.where(self.scale == 0, torch.inf, total)

    def _step(self, beta: float, fit_scale: bool, dtype: torch.dtype) -> None:
        """The sparse error, then the zero (and scale) by least squares, rounded to `dtype`."""
        # What the error keeps when its sparse part is taken away: e - sign(e) max(|e| - |e|^(p - 1) /
        # beta, 0).
        rest = torch.minimum(self.size, self.power.div_(beta)).copysign_(self.error)
        scale, zero = self.scale, self.zero
        if fit_scale:
            target, q = self.values + rest * scale, self.codes
            spread = q - q.mean(1, keepdim=True)
            square = spread.square().sum(1, keepdim=True)
            slope = (spread * target).sum(1, keepdim=True) / square
            # With one code in use any slope will do.
            scale = torch.where((square > 0) & (slope > 0), slope, scale).to(dtype).float()
            intercept = (target - scale * q).mean(1, keepdim=True)
            fitted = intercept if self.format.zero == "min" else -intercept / scale
        elif self.format.zero == "min":
            fitted = zero + scale * rest.mean(1, keepdim=True)
        else:
            fitted = zero - rest.mean(1, keepdim=True)
        fitted = fitted.to(dtype).float()
        self.zero = torch.where((self.scale == 0) | (scale == 0), zero, fitted)
        self.scale = scale
