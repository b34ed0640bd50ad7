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
from lowbit.quantize import rtn
from lowbit.tensor import QuantTensor


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
    - E) / scale), beta grows by `kappa` in each iteration, and the defaults. Our reading: e is
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
    _check_numbers(p, beta, kappa, iterations)
    rtn.check_weight(weight, format)
    qt = rtn.start(weight, format)
    for rows, w in rtn.slices(weight):
        first = 0
        for part in rtn.group_parts(w, format):
            groups = slice(first, first + part.shape[1])
            line = _Line(qt, rows, groups)
            best = line.error(part, p)
            for i in range(iterations):
                line.step(part, p, beta * kappa**i, fit_scale)
                best = line.keep(part, p, best)
            first = groups.stop
    rtn.fill_codes(qt, weight)
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


class _Line:
    """The values slope * code + intercept of some groups, (R, groups) fp64 each, as stored."""

    def __init__(self, qt: QuantTensor, rows: slice, groups: slice) -> None:
        # Of rows that are one group each.
        self.format = dataclasses.replace(qt.format, group=None)
        self.at = (rows, groups)
        self.scales, self.zeros = qt.tensors["scales"], qt.tensors["zeros"]
        self.scale, self.zero = self._stored(self.scales[self.at], self.zeros[self.at])

    @staticmethod
    def _stored(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        return scale.to(torch.float32), zero.to(torch.float32)

    def _round(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of weights (R, groups, G) fp32 by the rules of `rtn`."""
        rows = part.shape[0] * part.shape[1]
        w, scale, zero = (t.reshape(rows, -1) for t in (part, self.scale, self.zero))
        ratio = rtn.scaled(w, self.format, scale, zero if self.format.zero == "min" else None)
        codes = rtn.find_codes(ratio, self.format, zero, scale).to(torch.float32)
        values = reference.apply_scales(codes, self.format, scale, zero)
        return codes.view_as(part), values.view_as(part)

    def error(self, part: Tensor, p: float) -> Tensor:  # (R, groups) fp64
        """sum |W - W^|^p of every group."""
        return (part - self._round(part)[1]).double().abs().pow(p).sum(-1)

    def step(self, part: Tensor, p: float, beta: float, fit_scale: bool) -> None:
        """One iteration: the sparse error, then the zero (and scale) by least squares."""
        codes, values = self._round(part)
        unit = self.scale.double().unsqueeze(-1)
        error = torch.where(unit == 0, 0.0, (part.double() - values) / unit)
        size = error.abs()
        sparse = error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
        target, q = part.double() - sparse * unit, codes.double()
        scale = self.scale.double()
        if fit_scale:
            spread = q - q.mean(-1, keepdim=True)
            square = spread.square().sum(-1)
            slope = (spread * target).sum(-1) / square
            # With one code in use any slope will do.
            scale = torch.where((square > 0) & (slope > 0), slope, scale)
        scale = scale.to(self.scales.dtype).double()
        intercept = (target - scale.unsqueeze(-1) * q).mean(-1)
        zero = intercept if self.format.zero == "min" else -intercept / scale
        zero = torch.where(scale == 0, self.zero.double(), zero)
        self.scale, self.zero = self._stored(scale, zero.to(self.zeros.dtype))

    def keep(self, part: Tensor, p: float, best: Tensor) -> Tensor:
        """Stores the groups whose error is below `best` and returns the errors that are stored."""
        error = self.error(part, p)
        # A zero that overflowed its dtype has a NaN error and is not kept.
        better = error < best
        for stored, new in ((self.scales, self.scale), (self.zeros, self.zero)):
            stored[self.at] = torch.where(better, new.to(stored.dtype), stored[self.at])
        return torch.where(better, error, best)
