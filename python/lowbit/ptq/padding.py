"""Padding: which rows of the inputs of a linear belong to tokens that an attention mask hides."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MASK, _ENCODER = "attention_mask", "encoder_hidden_states"


class Padding:
    """The attention masks of the calls of a model's modules, innermost last.

    A mask is an `attention_mask` of shape (batch, tokens), 0 or False where there is padding, in a
    call of the model or of a module in it; the innermost one counts. In a decoder that is given the
    states of an encoder and no mask of its own, none does.
    """

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []
        self._last: Tensor | None = None

    @classmethod
    @contextlib.contextmanager
    def watch(cls, model: nn.Module) -> Iterator[Padding]:
        """Follows the calls of a model in the body of `with`; hooks are removed at the end."""
        padding = cls()
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                names = list(inspect.signature(module.forward).parameters)
                if module is model or _MASK in names:
                    padding._attach(module, names, stack)
            yield padding

    def _attach(self, module: nn.Module, names: list[str], stack: contextlib.ExitStack) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            mask = given.get(_MASK)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self._masks.append(mask != 0)
            elif not self._masks or (mask is None and given.get(_ENCODER) is not None):
                self._masks.append(None)
            else:
                self._masks.append(self._masks[-1])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._last = self._masks.pop()

        hooks = (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        )
        for hook in hooks:
            stack.callback(hook.remove)

    def mask(self, x: Tensor) -> Tensor | None:
        """Which rows of an input (..., K) of the running call count, one bool each; None if all.

        x has the shape (batch, tokens, K) or (batch * tokens, K) of the attention mask. Of another
        shape, as the tokens that a router sends to an expert, all rows count.
        """
        return _fitting(self._masks[-1] if self._masks else None, x)

    def mask_of_result(self, x: Tensor) -> Tensor | None:
        """The same for the result of the last call that ended."""
        return _fitting(self._last, x)

    def rows(self, x: Tensor) -> Tensor:
        """The rows that count of an input of the running call."""
        mask = self.mask(x)
        return x if mask is None else x.flatten(0, -2)[mask]


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    fits = x.shape[:2] == mask.shape if x.dim() == 3 else x.dim() == 2 and len(x) == mask.numel()
    return mask.flatten().to(x.device) if fits else None
