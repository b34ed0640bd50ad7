"""The modes of torch around a call: leaving them for tensors that are kept, and knowing of derivatives that only modes
ask for: those of torch.func and of forward-mode AD.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Outside of inference mode and of the transforms of torch.func: for tensors that are made in one call and kept.

    An inference tensor can never be saved for backward, and what is made inside a transform is a wrapper that dies
    with it. Nothing is left under torch.compile, which makes the tensors itself.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.inference_mode(False), contextlib.ExitStack() as left:
        while _functorch.peek_interpreter_stack() is not None:
            left.enter_context(temporarily_pop_interpreter_stack())
        yield


def normal(t: Tensor) -> Tensor:
    """A tensor that can be saved for backward: itself, or a copy of an inference tensor, made `outside`."""
    return t if torch.compiler.is_compiling() or not t.is_inference() else t.clone()


def in_dual_level() -> bool:
    """Whether there may be tensors with tangents (forward-mode AD)."""
    return forward_ad._current_level >= 0


def active() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work. torch.compile cannot ask that."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def bare(t: Any) -> Any:
    """A tensor or None without the wrapper that torch.func gives every operand of an autograd.Function, if no gradient
    of it is wanted there; what wraps it because of an outer transform stays.
    """
    if t is None:
        return None
    t = _functorch.unwrap_if_dead(t)
    if not torch._C._are_functorch_transforms_active():
        return t
    mine = _functorch.maybe_get_level(t) == _functorch.current_level()
    if mine and _functorch.is_gradtrackingtensor(t) and not t.requires_grad:
        return _functorch.get_unwrapped(t)
    return t


def has_tangent(t: Tensor) -> bool:
    """Whether operations on t, now, would have to give tangents."""
    return (
        in_dual_level()
        and forward_ad._is_fwd_grad_enabled()
        and forward_ad.unpack_dual(t).tangent is not None
    )
