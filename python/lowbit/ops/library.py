"""Defines the ops of torch.ops.lowbit: schema, implementation, fake and derivatives of one op in one call.

torch.library takes flat lists of arguments. `{W}` in a schema stands for the operands of a weight
(`layouts.operands.SCHEMA`); an implementation gets them as one `Operands`, and so does its fake. `{Ws}` stands for
the operands of several weights, a list for each field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lowbit.layouts.operands import SCHEMA, Operands
from lowbit.ops import transforms

_NUM_OPERANDS = len(Operands._fields)
_SEVERAL = re.sub(r"(\w+\??) (\w+)", r"\1[] \2", SCHEMA)
_library = torch.library.Library("lowbit", "FRAGMENT")


def op(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    transform: Callable[..., Any] | None = None,
    any_batch: bool = False,
    fast: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
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
        fast: makes of the implementation, on flat arguments, one that answers usual requests by itself.
        derivatives: `setup_context` and `backward` for autograd, on flat arguments; without them the implementation
            must refuse inputs that require grad.
    """
    before, found, _ = schema.partition("{W")
    at = before.count(",") if found else None
    several = "{Ws}" in schema
    flat = schema.replace("{Ws}", _SEVERAL).replace("{W}", SCHEMA)
    _library.define(name + flat, tags=(torch.Tag.pt2_compliant_tag,))
    call = _whole(implementation, at, several)
    for key in ("CPU", "CUDA"):
        _library.impl(name, call if fast is None else fast(call), key)
    torch.library.register_fake(f"lowbit::{name}", _whole(fake, at, several), lib=_library)
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


def _whole(function: Callable[..., Any], at: int | None, several: bool) -> Callable[..., Any]:
    """`function`, called with flat arguments, those from `at` on as one Operands, or as a list of them."""
    if at is None:
        return function
    end = at + _NUM_OPERANDS

    def call(*args: Any) -> Any:
        given = args[at:end]
        return function(*args[:at], gather(*given) if several else Operands(*given), *args[end:])

    return call


def gather(*lists: Sequence[Any]) -> list[Operands]:
    """The operands of several weights from a list for each field.

    Raises:
        ValueError: the lists are not equally long.
    """
    counts = [len(each) for each in lists]
    if len(set(counts)) != 1:
        raise ValueError(f"{', '.join(Operands._fields)} must be equally long, got {counts}")
    return list(map(Operands, *lists))


def scatter(weights: Sequence[Operands]) -> tuple[list[Any], ...]:
    """Inverse of `gather`, of at least one weight."""
    return tuple(map(list, zip(*weights, strict=True)))


def flat_calls(definitions: Mapping[str, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Overload -> a function of its flat arguments, for functions that take what the op's implementation takes."""
    calls = {}
    for name, definition in definitions.items():
        overload = getattr(torch.ops.lowbit, name).default
        kinds = {a.name: (at, str(a.type)) for at, a in enumerate(overload._schema.arguments)}
        at, kind = kinds.get("codes", (None, ""))
        calls[overload] = _whole(definition, at, kind.startswith("List"))
    return calls
