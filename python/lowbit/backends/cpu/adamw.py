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
        param=address(param),
        grad=address(grad),
        dtype=CODES[param.dtype],
        numel=param.numel(),
        exp_avg=_state(exp_avg),
        exp_avg_sq=_state(exp_avg_sq),
        expand=len(exp_avg.terms) == 3,
        step=step.number.item(),
        lr=step.lr.item(),
        beta1=step.beta1,
        beta2=step.beta2,
        eps=step.eps,
        weight_decay=step.weight_decay,
        maximize=step.maximize,
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _state(state: State) -> _C.Fp8State:
    return _C.Fp8State(
        codes=address(state.codes), type=TYPES[state.codes.dtype], terms=address(state.terms)
    )
