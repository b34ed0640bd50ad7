"""Hands AdamW with FP8 states to the compiled kernel. No maths and no checks; `isa` caps the instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit.backends.cpu.fp8 import TYPES
from lowbit.backends.cpu.requests import CODES
from lowbit.reference.adamw import State, Step
from lowbit.strides import address


def adamw_(
    param: Tensor,  # contiguous, as are the others
    grad: Tensor,
    exp_avg: State,
    exp_avg_sq: State,
    step: Step,
    isa: str = "",
) -> None:
    """`reference.adamw_` in fp32."""
    _C.fp8_adamw_ptr(
        address(param),
        address(grad),
        CODES[param.dtype],
        param.numel(),
        _operand(exp_avg),
        _operand(exp_avg_sq),
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


def _operand(state: State) -> tuple[int, int, int]:
    return address(state.codes), TYPES[state.codes.dtype], address(state.terms)
