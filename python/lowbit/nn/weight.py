"""PackedWeight: what `layer.weight` is of a layer that has no dense weight.

Shape, dtype, device and views cost nothing. Whatever else torch computes with it makes the dense weight, for that one
operation: no dense copy stays, and nothing of it is in parameters, buffers or state dicts.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_logger = logging.getLogger("lowbit")
Source = Callable[[], Tensor]


class HasPackedWeight(nn.Module):
    """A layer whose `weight` is computed when it is asked for."""

    def weight_source(self) -> Source:
        """What makes the dense weight of this moment, in the dtype of `weight`."""
        raise NotImplementedError

    def weight_spec(self) -> tuple[Sequence[int], torch.dtype, torch.device]:
        """Shape, dtype and device of `weight`."""
        raise NotImplementedError

    def set_weight_dtype(self, dtype: torch.dtype) -> None:
        """Sets the dtype of `weight`."""
        raise NotImplementedError

    def learnable_parts(self) -> list[str]:
        """The tensors of the packed weight that require grad."""
        raise NotImplementedError

    def scale_weight(self, factor: float) -> None:
        """Multiplies the weight by a factor, in place.

        Raises:
            NotImplementedError: the layer or its format cannot do that exactly.
        """
        raise NotImplementedError(
            f"the weight of a {type(self).__name__} is packed and cannot be multiplied in place"
        )

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
        elif not (
            isinstance(value, PackedWeight) and value.whole and self.shares_weight(value.owner)
        ):
            of = f" of a {type(value.owner).__name__}" if isinstance(value, PackedWeight) else ""
            raise TypeError(
                f"weight of a {type(self).__name__} is packed and cannot be set or tied to another one, got a "
                f"{type(value).__name__}{of}: put another layer in its place, or let both share one "
                "packed weight (share_weight)"
            )


class PackedWeight(Tensor):
    """Stands for the dense weight of a layer, or for a view of it, without holding it.

    It takes part in operations of torch as a constant of its layer's dtype; each of them dequantizes anew, and
    so does their backward. It cannot be written, but for `mul_` and `div_` by a number where that is exact.

    Attributes:
        owner: the layer.
        whole: whether it is the weight itself and no view.
    """

    owner: HasPackedWeight
    whole: bool
    _source: Source | None
    _detached: bool
    # Not to be initialized by transformers.
    _is_hf_initialized = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, owner: HasPackedWeight) -> PackedWeight:
        """Stands for the weight that `owner` has now."""
        shape, dtype, device = owner.weight_spec()
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.owner, made._source, made.whole, made._detached = owner, None, True, False
        # What nn.Module.get_parameter looks at, and so tie_weights of transformers.
        made._is_param = True
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation on the dense weight; a view is not computed before it is used."""
        kwargs, schema = kwargs or {}, func._schema
        rest = (kwargs.get(a.name) for a in schema.arguments[len(args) :])
        given = zip(schema.arguments, (*args, *rest), strict=True)
        aliased = [(a.alias_info.is_write, t) for a, t in given if a.alias_info is not None]
        for is_write, t in aliased:
            if is_write and isinstance(t, cls):
                return t._write(func, args[1:], kwargs)
        if len(aliased) == 1 and isinstance(aliased[0][1], cls) and args[0] is aliased[0][1]:
            return args[0]._view(func, args[1:], kwargs)
        name = schema.name.partition("::")[2]
        args, kwargs = tree_map(
            lambda t: t.dense(name) if isinstance(t, cls) else t, (args, kwargs)
        )
        return func(*args, **kwargs)

    def _view(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One view, or a list of them, each of which makes the weight when it is used."""
        source, detached = (
            self._get_source(),
            self._detached or func is torch.ops.aten.detach.default,
        )
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        views = func(like, *args, **kwargs)

        def wrap(view: Tensor, pick: Callable[[Any], Tensor]) -> Tensor:
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                type(self), view.shape, view.stride(), dtype=view.dtype, device=self.device
            )
            made.owner, made.whole, made._detached = self.owner, False, detached
            made._source = lambda: pick(func(source(), *args, **kwargs))
            return made  # type: ignore[no-any-return]

        if isinstance(views, Tensor):
            return wrap(views, _itself)
        return [wrap(view, operator.itemgetter(i)) for i, view in enumerate(views)]

    def dense(self, asked: str) -> Tensor:
        """Computes the weight; `asked` says in the log what for."""
        learnable = self.owner.learnable_parts()
        if learnable and torch.is_grad_enabled() and not self._detached:
            raise NotImplementedError(
                f"{asked}: {learnable} of a {type(self.owner).__name__} are learnable and would get no gradient "
                "from its weight: call the layer, or use weight.detach()"
            )
        _log(type(self.owner).__name__, asked)
        return self._get_source()()

    def _get_source(self) -> Source:
        # That of the first use: backward gets the same weight, also if the layer is loaded meanwhile.
        self._source = self._source or self.owner.weight_source()
        return self._source

    def _write(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        factor = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        if self.whole and isinstance(factor, int | float) and func._overloadpacket in _SCALING:
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
        """As `detach()`; it cannot be set."""
        return self.detach()

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
        """None for a view. Raises for a weight: nn.Module.register_parameter asks, to make it that of a dense layer."""
        if isinstance(self, nn.Parameter):
            raise NotImplementedError(
                f"the weight of a {type(self.owner).__name__} is packed and cannot be the parameter of another "
                "module (a dense layer tied to a packed one): pack both, or neither"
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


def _itself(view: Tensor) -> Tensor:
    return view


_SCALING = (torch.ops.aten.mul_, torch.ops.aten.div_)


@functools.cache
def _log(kind: str, asked: str) -> None:
    _logger.warning(
        "the weight of a %s is dequantized in every call that asks for it, here %s", kind, asked
    )
