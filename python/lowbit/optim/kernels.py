"""Glue: one step of AdamW with FP8 states in the compiled kernels and in Triton. No maths and no checks.

`param`, `grad` and the states are contiguous; terms are (3, groups) with expansion and (1, groups) without.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.requests import CODES
from lowbit.backends.triton import launch as triton
from lowbit.fp8.cpu import TYPES
from lowbit.fp8.dtypes import FLOAT8
from lowbit.strides import address

# Groups of a Triton program.
_GROUPS = 8


class State(NamedTuple):
    """A quantized state: FP8 codes and the terms of their groups."""

    codes: Tensor
    terms: Tensor

    def addresses(self) -> tuple[int, int, int]:
        """What the compiled kernels take."""
        return address(self.codes), TYPES[self.codes.dtype], address(self.terms)


class Step(NamedTuple):
    """The numbers of a step; `number` and `lr` are fp32 tensors of one element on the device of the parameter."""

    number: Tensor
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def cpu_step(
    param: Tensor, grad: Tensor, exp_avg: State, exp_avg_sq: State, step: Step, isa: str = ""
) -> None:
    """One step in place; `isa` caps the instruction set as LOWBIT_ISA does."""
    _C.fp8_adamw_ptr(
        address(param),
        address(grad),
        CODES[param.dtype],
        param.numel(),
        exp_avg.addresses(),
        exp_avg_sq.addresses(),
        len(exp_avg.terms) == 3,
        step.number.item(),
        step.lr.item(),
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
        step.maximize,
        torch.get_num_threads(),
        isa,
    )


def triton_step(param: Tensor, grad: Tensor, exp_avg: State, exp_avg_sq: State, step: Step) -> None:
    """One step in place, on CUDA tensors or in Triton's interpreter."""
    p, g = param, grad
    if triton.interpreted(param.device):
        p, g = param.float(), grad.float()
    groups = exp_avg.terms.shape[1]
    kernel = triton.kernels().fp8_adamw.fp8_adamw_kernel
    with triton.on_device(param.device):
        kernel[(-(-groups // _GROUPS),)](
            p,
            g,
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
    """The dtypes of the states as constants of the Triton kernel."""
    constants: dict[str, int | float | bool] = {"EXPAND": expand, "GROUPS": _GROUPS}
    for prefix, dtype in (("", exp_avg), ("SQ_", exp_avg_sq)):
        f = FLOAT8[dtype]
        constants[prefix + "MAX"], constants[prefix + "LOG2_MAX"] = f.max, math.log2(f.max)
        constants[prefix + "MANTISSA"], constants[prefix + "BIAS"] = f.mantissa, f.bias
        constants[prefix + "MAX_CODE"] = f.max_code
    return constants


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
