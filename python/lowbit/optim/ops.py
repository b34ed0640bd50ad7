"""torch.ops.lowbit.fp8_adamw: schema, fake and checks of one step of AdamW with FP8 states."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lowbit.fp8.dtypes import check_float8
from lowbit.ops import checks
from lowbit.optim import kernels, reference
from lowbit.optim.kernels import State, Step

_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define(
    "fp8_adamw(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_terms, "
    "Tensor(d!) exp_avg_sq, Tensor(e!) exp_avg_sq_terms, Tensor step, Tensor lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool maximize) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_betas(beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Raises ValueError unless 0 <= beta < 1, and eps and weight_decay are not negative and finite."""
    for name, value, below in (
        ("betas[0]", beta1, 1.0),
        ("betas[1]", beta2, 1.0),
        ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
    ):
        if not 0 <= value < below:
            raise ValueError(f"{name} must be at least 0 and below {below}, got {value}")


def _check(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_terms: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_terms: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    checks.check_float("param", param.dtype)
    if grad.dtype != param.dtype:
        raise TypeError(f"grad must have the dtype of param, {param.dtype}, got {grad.dtype}")
    expand = exp_avg_terms.dim() == 2 and exp_avg_terms.shape[0] == 3
    terms = (reference.num_terms(expand), reference.num_groups(param.numel()))
    expected: tuple[tuple[str, Tensor, tuple[int, ...], torch.dtype | None], ...] = (
        ("grad", grad, tuple(param.shape), None),
        ("exp_avg", exp_avg, tuple(param.shape), None),
        ("exp_avg_terms", exp_avg_terms, terms, torch.float32),
        ("exp_avg_sq", exp_avg_sq, tuple(param.shape), None),
        ("exp_avg_sq_terms", exp_avg_sq_terms, terms, torch.float32),
        ("step", step, (), torch.float32),
        ("lr", lr, (), torch.float32),
    )
    for name, t, shape, dtype in expected:
        if t.shape != shape or t.device != param.device or dtype not in (None, t.dtype):
            raise ValueError(
                f"{name} must be {dtype or t.dtype} of shape {shape} on {param.device}, got "
                f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"
            )
    for name, t in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_float8(name, t.dtype)
    for name, t, _, _ in expected[1:5]:
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    check_betas(beta1, beta2, eps, weight_decay)


def _impl(
    device_type: str,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_terms: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_terms: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    states = (exp_avg, exp_avg_terms, exp_avg_sq, exp_avg_sq_terms)
    _check(param, grad, *states, step, lr, beta1, beta2, eps, weight_decay)
    if param.numel() == 0:
        return
    run = kernels.cpu_step if device_type == "cpu" else kernels.triton_step
    values = param.contiguous()
    numbers = Step(step, lr, beta1, beta2, eps, weight_decay, maximize)
    run(values, grad.contiguous(), State(*states[:2]), State(*states[2:]), numbers)
    if values is not param:
        param.copy_(values)
    # The kernels write behind autograd's back.
    for t in (param, *states):
        torch.autograd.graph.increment_version(t)


def _fake(*args: object) -> None:
    _check(*args[:-1])  # type: ignore[arg-type]


for _key in ("CPU", "CUDA"):
    _library.impl("fp8_adamw", functools.partial(_impl, _key.lower()), _key)
torch.library.register_fake("lowbit::fp8_adamw", _fake, lib=_library)
fp8_adamw = torch.ops.lowbit.fp8_adamw.default
