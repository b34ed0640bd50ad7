"""as_it_was: what holds a model together, put back if something raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lowbit.nn.siblings import groups_of
from lowbit.nn.surgery import point_hooks_at

_INSIDE = (dict, set)


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """If the body raises anything, every module of a model has again the attributes, children, tensors and hooks that
    it had, a configuration (`config`) its entries, and siblings are fused as they were.

    Values that are written in place stay so. What is replaced is kept in memory until the end of the body.
    """
    modules = list(model.modules())
    configs = {id(c): c for m in modules if hasattr(c := vars(m).get("config"), "__dict__")}
    kept = [_Kept(each) for each in (*modules, *configs.values(), *groups_of(model))]
    try:
        yield
    except BaseException:
        for each in kept:
            each.put_back()
        for module in modules:
            point_hooks_at(module)
        raise


class _Kept:
    """The attributes of an object, and what dicts and sets among them hold."""

    def __init__(self, owner: object) -> None:
        self._own: dict[str, Any] = vars(owner)
        self._attributes = dict(self._own)
        self._inside = [(v, v.copy()) for v in self._own.values() if isinstance(v, _INSIDE)]

    def put_back(self) -> None:
        """Gives them back."""
        self._own.clear()
        self._own.update(self._attributes)
        for value, content in self._inside:
            value.clear()
            value.update(content)
