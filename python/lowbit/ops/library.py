"""Defines the ops of torch.ops.lowbit: schema, implementation, fake and derivatives of one op in one call.

torch.library takes flat lists of arguments. `{W}` in a schema stands for the operands of a weight
(`layouts.operands.SCHEMA`); an implementation gets them as one `Operands`, and so does its fake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.layouts.operands import SCHEMA, Operands
from lowbit.ops import transforms

_NUM_OPERANDS = len(Operands._fields)
_library = torch.library.Library("lowbit", "FRAGMENT")


def op(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    transform: Callable[..., Any] | None = None,
    any_batch: bool = False,
    derivatives: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Any:
    """Defines lowbit::name for the CPU and CUDA, and returns its overload.

    Args:
        name: of the op.
        schema: "(...) -> ...", `{W}` for the operands of a weight.
        implementation: computes the op; it gets an `Operands` in place of `{W}`.
        fake: checks the same arguments, without values, and returns an empty result.
        transform: takes the place of the op, with its flat arguments, inside the transforms of torch.func; by default
            the op itself is repeated and refuses derivatives.
        any_batch: the first argument may have more dimensions in front, which the result has then, too; only without
            `transform`.
        derivatives: `setup_context` and `backward` for autograd, on flat arguments; without them the implementation
            must refuse inputs that require grad.
    """
    before, found, _ = schema.partition("{W}")
    at = before.count(",") if found else None
    _library.define(name + schema.replace("{W}", SCHEMA), tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, _whole(implementation, at), key)
    torch.library.register_fake(f"lowbit::{name}", _whole(fake, at), lib=_library)
    if derivatives is not None:
        setup_context, backward = derivatives
        torch.library.register_autograd(
            f"lowbit::{name}", backward, setup_context=setup_context, lib=_library
        )
    overload = getattr(torch.ops.lowbit, name).default
    if transform is None:
        transform = transforms.opaque_call(overload, any_batch)
    transforms.register(_library, name, transform)
    return overload


def _whole(function: Callable[..., Any], at: int | None) -> Callable[..., Any]:
    """`function`, called with flat arguments, those from `at` on as one Operands."""
    if at is None:
        return function
    end = at + _NUM_OPERANDS

    def call(*args: Any) -> Any:
        return function(*args[:at], Operands(*args[at:end]), *args[end:])

    return call
