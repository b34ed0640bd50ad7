"""The same values, lying otherwise in memory, and functions that must not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A function of tensors by name. The first dimension of `rows` may be 0; operands not in order are `refused`.

    Not `exact`: products of plain torch, whose last bits depend on where in memory a matrix begins.
    """

    call: Callable[..., Any]
    operands: dict[str, Tensor]
    rows: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    exact: bool = True


CASES: dict[str, Callable[[int], Case]] = {}


def case(name: str) -> Callable[[Callable[[int], Case]], Callable[[int], Case]]:
    def add(make: Callable[[int], Case]) -> Callable[[int], Case]:
        assert name not in CASES
        CASES[name] = make
        return make

    return add


def variants(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the shape and dtype of t. Expanded ones repeat a part of it, the others hold its values."""
    yield "storage offset", _filled(_empty(t, t.numel() + 1)[1:].view(t.shape), t)
    if t.is_floating_point() and t.element_size() > 1:
        yield "negative bit", torch._neg_view(-t)
    if not t.dim():
        return
    *lead, last = t.shape
    yield "every other element", _filled(_empty(t, *lead, 2 * last)[..., ::2], t)
    yield "row stride", _filled(_empty(t, *lead, last + 5)[..., 2 : last + 2], t)
    yield "every other row", _filled(_empty(t, 2 * t.shape[0], *t.shape[1:])[::2], t)
    yield "expanded", t[:1].expand_as(t)
    if t.dim() > 1:
        yield (
            "transposed",
            _filled(_empty(t, *reversed(t.shape)).permute(*reversed(range(t.dim()))), t),
        )
        yield "expanded rows", t[..., :1].expand_as(t)
    if t.dim() == 4:
        yield "channels last", t.contiguous(memory_format=torch.channels_last)


def plain(t: Tensor) -> Tensor:
    """A copy that lies as kernels take it."""
    return t.resolve_neg().clone(memory_format=torch.contiguous_format)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shapes, dtypes and all bits are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return plain(t.detach()).reshape(-1).view(torch.uint8)


def _empty(t: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=t.dtype)


def _filled(view: Tensor, t: Tensor) -> Tensor:
    return view.copy_(t)


def flat(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [t for part in made for t in flat(part)]


def walk(c: Case) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor], bool]]:
    """(what, operands, the same in order, refused) for every operand and stride kind."""
    for name, t in c.operands.items():
        for kind, other in variants(t):
            refused = name in c.refused and not other.is_contiguous()
            yield (
                f"{name}, {kind}",
                {**c.operands, name: other},
                {**c.operands, name: plain(other)},
                refused,
            )
    for kind in ("every other element", "transposed", "row stride"):
        if not c.rows:
            break
        empty = {
            name: next(
                (o[:0] for k, o in variants(c.operands[name]) if k == kind), c.operands[name][:0]
            )
            for name in c.rows
        }
        in_order = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in empty.items()}
        yield f"no rows, {kind}", {**c.operands, **empty}, {**c.operands, **in_order}, False
