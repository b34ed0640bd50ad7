"""AdamW with FP8 states in plain torch: the only truth. COAT (Xi et al., arXiv 2410.19313), dynamic range expansion.

A state of P values is cut into groups of 128 in the order of the flattened parameter; the last may be shorter. Codes
are FP8 (P,), terms are fp32 (3, groups): scale s, exponent k and center c of each group, or scales alone (1, groups)
without expansion. A code z stands for sign(z) |z s|^(1 / k) c, without expansion for z s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.float8 import FLOAT8

GROUP = 128
# What is smaller counts as zero, where groups are expanded each value: exponents below 1 / 16 and scales that are not
# normal numbers would be needed.
TINY = 2.0**-100
EXPONENT_STEPS = 16
# Groups of values that hardly differ have r near 1; beyond this exponent fp32 powers lose what FP8 could hold.
MAX_EXPONENT = 256.0


class State(NamedTuple):
    """A quantized state: FP8 codes and the terms of their groups."""

    codes: Tensor
    terms: Tensor


class Step(NamedTuple):
    """The numbers of a step; `number` and `lr` are fp32 tensors of one element on the device of the parameter."""

    number: Tensor
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def num_groups(numel: int) -> int:
    """Groups of a state of `numel` values."""
    return -(-numel // GROUP)


def num_terms(expand: bool) -> int:
    """Numbers that a group has beside its codes."""
    return 3 if expand else 1


def expanded_range(dtype: torch.dtype) -> float:
    """Ratio of largest to smallest magnitude that expansion gives a group: FP8_MAX^2 / 2, as in COAT's kernels.

    The smallest magnitude then lands on 2 / FP8_MAX, a little above the smallest subnormal (the paper's text has
    FP8_MAX / smallest subnormal, which would leave it one bit less).
    """
    return FLOAT8[dtype].max ** 2 / 2


def quantize(x: Tensor, dtype: torch.dtype, expand: bool) -> tuple[Tensor, Tensor]:
    """Codes (P,) and terms (3 or 1, groups) of a state x of P values, computed in the dtype of x.

    With mx and mn the largest and the smallest magnitude of at least 2^-100 in a group:
    k = floor(16 log2(FP8_MAX^2 / 2) / log2(mx / mn)) / 16, at most 256; c = sqrt(mx) sqrt(mn);
    s = (mx / c)^k / FP8_MAX; z = sign(x) (|x| / c)^k / s to nearest even. Without expansion s = mx / FP8_MAX and
    z = x / s. A group of zeros has code 0 and terms 1; one with NaN or infinity has code 0 and scale NaN.
    """
    numel, top = x.numel(), FLOAT8[dtype].max
    padded = x.new_zeros(num_groups(numel) * GROUP)
    padded[:numel] = x.reshape(-1)
    groups = padded.view(-1, GROUP)
    magnitude = groups.abs()
    largest = magnitude.amax(1)
    empty, finite = largest < TINY, largest.isfinite()
    used = finite & ~empty
    mx = torch.where(used, largest, 1.0)
    if expand:
        smallest = torch.where(magnitude >= TINY, magnitude, math.inf).amin(1)
        mn = torch.where(used, smallest, 1.0)
        log_range = (mx.log2() - mn.log2()).clamp_min(2.0**-20)
        steps = (EXPONENT_STEPS * math.log2(expanded_range(dtype)) / log_range).floor()
        k = (steps / EXPONENT_STEPS).clamp_max(MAX_EXPONENT)
        c = mx.sqrt() * mn.sqrt()
        scale = (mx / c) ** k / top
        z = (magnitude / c[:, None]) ** k[:, None] / scale[:, None]
        z = torch.where(magnitude >= TINY, z, 0.0)
        terms = [scale, torch.where(used, k, 1.0), torch.where(used, c, 1.0)]
    else:
        scale = mx / top
        z = magnitude / scale[:, None]
        terms = [scale]
    z = torch.where(used[:, None], z.clamp_max(top).copysign(groups), 0.0)
    terms[0] = torch.where(finite, torch.where(empty, 1.0, scale), math.nan)
    return z.float().to(dtype).view(-1)[:numel], torch.stack(terms).float()


def dequantize(codes: Tensor, terms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state (P,) that codes and terms stand for, computed in `dtype`."""
    group = torch.arange(codes.numel(), dtype=torch.int64, device=codes.device) // GROUP
    z = codes.reshape(-1).to(dtype) * terms[0].to(dtype)[group]
    if len(terms) == 1:
        return z
    _, k, c = terms.to(dtype)
    return z.sign() * z.abs() ** (1 / k[group]) * c[group]


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_terms: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_terms: Tensor,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), number `step` from 1 on, in place.

    States are dequantized, updated, used, and quantized again; the parameter is rounded once to its own dtype.
    """
    g = grad.reshape(-1).to(dtype) * (-1 if maximize else 1)
    m = beta1 * dequantize(exp_avg, exp_avg_terms, dtype) + (1 - beta1) * g
    v = beta2 * dequantize(exp_avg_sq, exp_avg_sq_terms, dtype) + (1 - beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    p = param.reshape(-1).to(dtype) * (1 - lr * weight_decay)
    p = p - lr / (1 - beta1**step) * (m / denominator)
    param.copy_(p.view_as(param))
    for values, codes, terms in ((m, exp_avg, exp_avg_terms), (v, exp_avg_sq, exp_avg_sq_terms)):
        new_codes, new_terms = quantize(values, codes.dtype, len(terms) == 3)
        codes.copy_(new_codes.view_as(codes))
        terms.copy_(new_terms)
