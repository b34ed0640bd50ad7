"""Ops inside the transforms of torch.func (grad, vmap, jvp, ...), which meet them before autograd does.

Kernels know no transforms. Here an op gets what runs in its place inside of one: for most, the op itself, repeated for
every element of a batch, which refuses derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

# What the dispatcher asks first while a transform is active.
_KEY = "FuncTorchDynamicLayerFrontMode"


def register(library: torch.library.Library, name: str, call: Callable[..., Any]) -> None:
    """Lets `call`, of the op's arguments, take the place of lowbit::name inside a transform."""
    library.impl(name, call, _KEY)


def opaque_call(op: Any, any_batch: bool = False) -> Callable[..., Any]:
    """The op itself, without derivatives, to be called inside a transform.

    `any_batch` says that the first argument may have more dimensions in front, which the result has then, too.
    """
    return functools.partial(opaque, op, any_batch)


def opaque(op: Any, any_batch: bool, *args: Any) -> Any:
    """A call of an op that has no derivatives."""
    return _Opaque.apply(op, any_batch, *args)


def repeat(
    function: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """What the vmap rule of an autograd.Function returns: a call for every element of the batch."""
    made = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    return tuple(map(torch.stack, zip(*made, strict=True))), (0,) * len(made[0])


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(op: Any, any_batch: bool, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"{_name(ctx.op)} has no gradients")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"{_name(ctx.op)} has no derivatives and an input has a tangent (forward-mode AD)"
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], op: Any, any_batch: bool, *args: Any
    ) -> tuple[Any, Any]:
        first, others = in_dims[2], in_dims[3:]
        if any_batch and first is not None and all(d is None for d in others):
            return _Opaque.apply(op, any_batch, args[0].movedim(first, 0), *args[1:]), 0
        return repeat(_Opaque.apply, info, in_dims, (op, any_batch, *args))


def _name(op: Any) -> str:
    return str(op.name())
