"""Launches AdamW with FP8 states, on CUDA tensors or under Triton's interpreter. No maths and no checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.backends.triton.fp8 import constants
from lowbit.backends.triton.launch import kernels, on_device, readable
from lowbit.float8 import FLOAT8
from lowbit.reference.adamw import State, Step

# Groups of a program.
_GROUPS = 8


def adamw_(
    param: Tensor,  # contiguous, as are the others
    grad: Tensor,
    exp_avg: State,
    exp_avg_sq: State,
    step: Step,
) -> None:
    """`reference.adamw_` in fp32."""
    p = readable(param)
    groups = exp_avg.terms.shape[1]
    with on_device(param.device):
        kernels().fp8_adamw.fp8_adamw_kernel[(-(-groups // _GROUPS),)](
            p,
            readable(grad),
            exp_avg.codes.view(torch.uint8),
            exp_avg.terms,
            exp_avg_sq.codes.view(torch.uint8),
            exp_avg_sq.terms,
            step.number,
            step.lr,
            param.numel(),
            groups,
            step.beta1,
            _log(step.beta1),
            step.beta1 - 1 if step.maximize else 1 - step.beta1,
            step.beta2,
            _log(step.beta2),
            1 - step.beta2,
            step.eps,
            step.weight_decay,
            **meaning(exp_avg.codes.dtype, exp_avg_sq.codes.dtype, len(exp_avg.terms) == 3),
            num_warps=4,
            enable_fp_fusion=False,
        )
    if p is not param:
        param.copy_(p)


def meaning(
    exp_avg: torch.dtype, exp_avg_sq: torch.dtype, expand: bool
) -> dict[str, int | float | bool]:
    """The dtypes of the states as constants of the kernel."""
    made: dict[str, int | float | bool] = {"EXPAND": expand, "GROUPS": _GROUPS}
    for prefix, dtype in (("", exp_avg), ("SQ_", exp_avg_sq)):
        each = constants(dtype, "max", "mantissa", "bias", "max_code")
        each["LOG2_MAX"] = math.log2(FLOAT8[dtype].max)
        made |= {prefix + name: value for name, value in each.items()}
    return made


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
