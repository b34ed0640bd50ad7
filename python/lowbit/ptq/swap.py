"""Replacing modules of a model: all of them, or none."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from lowbit.nn.surgery import put_back, replace

_logger = logging.getLogger("lowbit")


class Swap:
    """Puts modules in the place of others, and remembers those."""

    def __init__(self, model: nn.Module, keep: bool) -> None:
        self.done: list[str] = []
        self._model, self._keep = model, keep
        self._originals: list[tuple[Sequence[str], nn.Module]] = []

    def __call__(self, names: Sequence[str], module: nn.Module, own: Collection[str] = ()) -> None:
        """Replaces the module of all these names, as `lowbit.nn.surgery.replace` does."""
        if self._keep:
            self._originals.append((names, self._model.get_submodule(names[0])))
        replace(self._model, names, module, own=own)
        self.done.append(names[0])

    def undo(self) -> None:
        """Puts the modules back that were kept."""
        for names, module in reversed(self._originals):
            put_back(self._model, names, module)


@contextlib.contextmanager
def swapping(model: nn.Module, keep: bool = True) -> Iterator[Swap]:
    """Gives what replaces modules; if the body raises anything, all are put back.

    Tensors are made as usual in the body, also where inference mode is on.

    Args:
        model: the root of the names.
        keep: whether the old modules are kept for that. If not, they are free at once, and an error
            is noted with the last layer that was replaced.
    """
    swap = Swap(model, keep)
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        try:
            yield swap
        except BaseException as e:
            swap.undo()
            if not keep and swap.done:
                _note(e, f"{len(swap.done)} layers are replaced, up to {swap.done[-1]!r}")
            raise


def _note(error: BaseException, text: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        _logger.error(text)
