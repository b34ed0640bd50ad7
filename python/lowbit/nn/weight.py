"""PackedWeight: what `layer.weight` is of a layer that has no dense weight.

Shape, dtype and device cost nothing. Whatever else torch computes with it makes the dense weight, for that one
operation: no dense copy stays, and nothing of it is in parameters, buffers or state dicts.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_logger = logging.getLogger("lowbit")


class HasPackedWeight(nn.Module):
    """A layer whose `weight` is computed when it is asked for."""

    def weight_source(self) -> Callable[[], Tensor]:
        """What makes the dense weight of this moment, in the dtype of `weight`."""
        raise NotImplementedError

    def weight_spec(self) -> tuple[Sequence[int], torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        raise NotImplementedError

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype of `weight`."""
        raise NotImplementedError

    def scale_weight(self, factor: float) -> None:
        """Multiplies the weight by a factor, in place.

        Raises:
            NotImplementedError: the layer or its format cannot do that exactly.
        """
        raise NotImplementedError(f"a {type(self).__name__} cannot be scaled in place")

    def shares_weight(self, other: nn.Module) -> bool:
        """Whether this layer has the very weight of another one."""
        return other is self

    @property
    def weight(self) -> Tensor:
        """The weight as a dense layer has it: a PackedWeight, or while torch traces a dense tensor."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.weight_source()()
        return PackedWeight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif not (isinstance(value, PackedWeight) and self.shares_weight(value.owner)):
            of = f" of a {type(value.owner).__name__}" if isinstance(value, PackedWeight) else ""
            raise TypeError(
                f"weight of a {type(self).__name__} is packed and cannot be set or tied to another one, got a "
                f"{type(value).__name__}{of}: put another layer in its place, or let both share one "
                "packed weight (share_weight)"
            )


class PackedWeight(Tensor):
    """Stands for the dense weight of a layer, without holding it.

    It takes part in operations of torch as a constant of its layer's dtype; each of them dequantizes anew, and
    so does their backward. It cannot be written, but for `mul_` and `div_` by a number where that is exact.

    Attributes:
        owner: the layer.
    """

    owner: HasPackedWeight
    # For torch.nn.Module.get_parameter, so for tie_weights of transformers; and it is not to be initialized.
    _is_param = True
    _is_hf_initialized = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, owner: HasPackedWeight) -> PackedWeight:
        """Stands for the weight that `owner` has now."""
        shape, dtype, device = owner.weight_spec()
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.owner, made._source = owner, None
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation on the dense weight."""
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given, cls):
                return given._write(func, args[1:], kwargs)
        name = func._schema.name.partition("::")[2]
        args, kwargs = tree_map(
            lambda t: t.dense(name) if isinstance(t, cls) else t, (args, kwargs)
        )
        return func(*args, **kwargs)

    def dense(self, asked: str) -> Tensor:
        """Computes the weight; `asked` says in the log what for."""
        _log(type(self.owner).__name__, asked)
        # The tensors of the first use: backward gets the same weight, also if the layer is loaded meanwhile.
        self._source: Callable[[], Tensor] | None = self._source or self.owner.weight_source()
        return self._source()

    def _write(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        factor = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        if isinstance(factor, int | float) and func._overloadpacket in _SCALING:
            if func._overloadpacket is torch.ops.aten.div_:
                factor = 1 / factor if factor else math.inf
            self.owner.scale_weight(float(factor))
            self._source = None
            return self
        self._refuse(func._schema.name.partition("::")[2])

    def _refuse(self, asked: str) -> NoReturn:
        raise NotImplementedError(
            f"{asked}: the weight of a {type(self.owner).__name__} is packed: it has no dense memory and "
            "cannot be written or learned; take a copy (weight.clone()), or put a dense layer in its place"
        )

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The dense weight; it cannot be set."""
        return self.dense("data")

    @data.setter
    def data(self, value: object) -> None:
        """Raises: there is no dense memory."""
        self._refuse("data")

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """False; it cannot be set to True."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Takes False alone."""
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        """Takes False alone."""
        if requires_grad:
            self._refuse("requires_grad")
        return self

    @property
    def grad_fn(self) -> None:  # type: ignore[override]
        """Raises: nn.Module.register_parameter asks for it, to make a dense layer share this weight."""
        raise NotImplementedError(
            f"the weight of a {type(self.owner).__name__} is packed and cannot be the parameter of another module "
            "(a dense layer tied to a packed one): pack both, or neither"
        )

    def data_ptr(self) -> int:
        """Raises: there is no dense memory."""
        self._refuse("data_ptr")

    def share_memory_(self) -> PackedWeight:
        """Raises: there is no dense memory."""
        self._refuse("share_memory_")

    def numpy(self, *, force: bool = False) -> Any:
        """As `Tensor.numpy` of the dense weight."""
        return self.dense("numpy").numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense("numpy").__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """As `Tensor.tolist` of the dense weight."""
        return self.dense("tolist").tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense("dlpack").__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense("pickle").__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype}, {self.device}) of {type(self.owner).__name__}"


_SCALING = (torch.ops.aten.mul_, torch.ops.aten.div_)


@functools.cache
def _log(kind: str, asked: str) -> None:
    _logger.warning(
        "the weight of a %s is dequantized in every call that asks for it, here %s", kind, asked
    )
