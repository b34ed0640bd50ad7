"""FP8AdamW: AdamW with both states in FP8; takes the place of torch.optim.AdamW.

2.19 bytes of state for each parameter instead of 8: two codes, and six fp32 numbers for every 128 parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit.fp8.dtypes import FLOAT8, check_float8
from lowbit.ops import checks
from lowbit.optim import ops, reference

_STATES = ("exp_avg", "exp_avg_sq")


class FP8AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with states in FP8 and COAT's dynamic range expansion.

    COAT (Xi et al., arXiv 2410.19313) stores the moments in groups of 128 values; each group is raised to the power
    that spreads it over the whole range of FP8 before it is scaled and rounded (`lowbit.optim.reference`). A step
    dequantizes, updates and quantizes them in one pass; the arithmetic is fp32. It runs on CPU and, in Triton, on
    CUDA, where it can be captured in a graph: the count of steps is a tensor on the device, and so may `lr` be.

    State of a parameter: `step`; `exp_avg` and `exp_avg_sq`, FP8 of its shape; `exp_avg_terms` and
    `exp_avg_sq_terms`, fp32 (3, groups), or (1, groups) without expansion. A group that meets NaN or infinity is NaN
    from then on.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        exp_avg_dtype: torch.dtype = torch.float8_e4m3fn,
        exp_avg_sq_dtype: torch.dtype = torch.float8_e4m3fn,
        expand: bool = True,
        maximize: bool = False,
    ) -> None:
        """Makes the optimizer; every argument but `params` may also be set for a group of parameters.

        Args:
            params: parameters in fp32, bf16 or fp16, or groups of them, as torch's optimizers take.
            lr: learning rate; a tensor of one element for captured graphs.
            betas, eps, weight_decay: as in torch.optim.AdamW; the decay is decoupled.
            exp_avg_dtype, exp_avg_sq_dtype: torch.float8_e4m3fn or float8_e5m2, of the first and the second moment.
            expand: whether groups are expanded; without it 2.06 bytes a parameter and several times the error.
            maximize: whether to climb.

        Raises:
            ValueError: a number is out of range.
            TypeError: a dtype is not one of those above.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
            "expand": expand,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch's optimizers; checks the group."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returns, which is called first with gradients enabled.

        Raises:
            NotImplementedError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rates: dict[torch.device, Tensor] = {}
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, group, rates)
        return loss

    def _step(
        self, param: Tensor, group: dict[str, Any], rates: dict[torch.device, Tensor]
    ) -> None:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise NotImplementedError(f"gradients must be dense, got one of layout {grad.layout}")
        state = self.state[param]
        if not state:
            state.update(_new_state(param, group))
        if param.device not in rates:
            rates[param.device] = _rate(group["lr"], param.device)
        state["step"] += 1
        ops.fp8_adamw(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_terms"],
            state["exp_avg_sq"],
            state["exp_avg_sq_terms"],
            state["step"],
            rates[param.device],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # As bytes: torch can write float8 tensors with pickle but not read them.
        states = {p: {n: _as_bytes(t) for n, t in s.items()} for p, s in self.state.items()}
        return {**state, "state": states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = {p: {n: _from_bytes(t) for n, t in s.items()} for p, s in state["state"].items()}
        super().__setstate__({**state, "state": defaultdict(dict, states)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state dict of an FP8AdamW with the same parameters; states are copied to their devices.

        Raises:
            ValueError: a state is not that of an FP8AdamW on such a parameter.
        """
        for group in state_dict["param_groups"]:
            if missing := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(f"state_dict is not of an FP8AdamW: its groups lack {missing}")
        # torch would cast every state to the dtype of its parameter.
        without = {**state_dict, "state": {}}
        states = state_dict["state"]
        super().load_state_dict(without)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        loaded = {
            p: _copied_state(p, group, states[i])
            for i, (p, group) in zip(ids, params, strict=True)
            if i in states
        }
        self.state.clear()
        self.state.update(loaded)


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    ops.check_betas(beta1, beta2, group["eps"], group["weight_decay"])
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must have one element, got shape {tuple(lr.shape)}")
    elif not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    for name in _STATES:
        check_float8(f"{name}_dtype", group[f"{name}_dtype"])
    for param in group["params"]:
        checks.check_float("params", param.dtype)


def _as_bytes(t: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
    return (t.view(torch.uint8), t.dtype) if t.dtype in FLOAT8 else t


def _from_bytes(t: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
    return t if isinstance(t, Tensor) else t[0].view(t[1])


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float32).reshape(())
    return torch.full((), lr, dtype=torch.float32, device=device)


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    terms = (reference.num_terms(group["expand"]), reference.num_groups(param.numel()))
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    for name in _STATES:
        dtype = group[f"{name}_dtype"]
        state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        state[f"{name}_terms"] = torch.ones(terms, dtype=torch.float32, device=param.device)
    return state


def _copied_state(param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Tensor]:
    expected = _new_state(param, group)
    for name, t in expected.items():
        value = saved.get(name)
        if not isinstance(value, Tensor) or value.dtype != t.dtype or value.shape != t.shape:
            got = (
                f"{value.dtype} of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else value
            )
            raise ValueError(
                f"state_dict: {name} must be {t.dtype} of shape {tuple(t.shape)}, got {got}"
            )
        t.copy_(value)
    return expected
