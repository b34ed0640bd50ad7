"""replace: puts a module in the place of another one, with all that others have attached to the old one.

Hooks, buffers, parameters, children and attributes beyond those of the old module's class, training mode and
accelerate's hook move on to the new module; `obstacle` says what could not, so that a caller leaves such a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lowbit.nn.base import PackedModule
from lowbit.nn.weight import HasPackedWeight

# Handles of hooks refer to these very dicts, so the new module gets the dicts themselves.
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MEMBERS = ("_parameters", "_buffers", "_modules")
# What accelerate's add_hook_to_module sets.
_ACCELERATE = ("_hf_hook", "_old_forward", "forward")
_OF_TORCH = {*vars(nn.Module()), *_ACCELERATE}


def obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be replaced without losing something; None if it can."""
    kind, own = type(module), vars(module)
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"{names} of this {kind.__name__} is parametrized"
    if computed := [name for name in ("weight", "bias") if name in own and own[name] is not None]:
        return f"{' and '.join(computed)} is computed anew in every call (weight_norm, pruning)"
    if kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl:
        return f"{kind.__name__} has a __call__ of its own"
    if (
        not isinstance(module, PackedModule)
        and kind.get_extra_state is not nn.Module.get_extra_state
    ):
        return f"{kind.__name__} has an extra state of its own"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled in place (Module.compile)"
    if patched := sorted(_patched(module)):
        return f"its {' and '.join(patched)} is patched"
    for name, value in _attached(module):
        if value is module or getattr(value, "__self__", None) is module:
            return f"its {name} refers to the module itself"
    if any(getattr(hook, "offload", False) for hook in _accelerate_hooks(module)):
        return "accelerate offloads its weight"
    return None


def replace(
    model: nn.Module,
    names: Sequence[str] | str,
    module: nn.Module,
    *,
    own: Collection[str] = (),
) -> None:
    """Puts `module` in the place of a module of `model`, with what is attached to that.

    Handles of its hooks remove them from the new module. The old module is not to be used any more.

    Args:
        model: the root that `names` start from.
        names: of the one module that is replaced; another name of it may follow in another call.
        module: what takes its place, without hooks of its own.
        own: attributes that belong to the class of the old module, besides those in its
            `__constants__`, and are not kept.

    Raises:
        ValueError: a name is that of the model itself, or the names are those of several modules.
        NotImplementedError: something would be lost (`obstacle`), or has the name of something of
            the new module. Nothing is changed then.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names or "" in names:
        raise ValueError(f"names must be those of a module in the model, got {names}")
    old = model.get_submodule(names[0])
    if any(model.get_submodule(name) is not old for name in names):
        raise ValueError(f"names must be those of one module, got {names}")
    if old is not module:
        if reason := obstacle(old):
            raise NotImplementedError(f"{names[0]} cannot be replaced: {reason}")
        _carry(old, module, own, names[0])
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def put_back(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    """Puts a module that was replaced in its place again; hooks that its successor got since are its own."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    # The new module has got the dicts of hooks.
    point_hooks_at(module)


def point_hooks_at(module: nn.Module) -> None:
    """Makes a module's hooks call it that know the module that they are called with."""
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)  # type: ignore[attr-defined]


def _carry(old: nn.Module, new: nn.Module, own: Collection[str], name: str) -> None:
    if isinstance(new, PackedModule):
        own = {*own, *new.takes_over}
    # What a class says of itself, and that is nothing to a module in its place.
    own = {*own, *getattr(type(old), "not_carried", ())}
    members = {
        group: {
            key: value
            for key, value in getattr(old, group).items()
            if key not in own and key not in ("weight", "bias")
        }
        for group in _MEMBERS
    }
    attributes = {k: v for k, v in vars(old).items() if k not in _OF_TORCH and k not in own}
    # What the class itself has is kept where the new module lacks it: a convolution's in_channels.
    constants = _constants(old)
    extra = {key: value for key, value in attributes.items() if key not in constants}
    for values in members.values():
        extra.update(values)
    if taken := sorted(key for key in extra if _has_other(new, key, extra[key])):
        raise NotImplementedError(
            f"{name} cannot be replaced: its {' and '.join(taken)} would take the place of what a "
            f"{type(new).__name__} has under this name"
        )
    if members["_buffers"] and isinstance(new, PackedModule) and new._tied:
        raise NotImplementedError(
            f"{name} cannot be replaced: its {' and '.join(members['_buffers'])} would be that of every "
            "module that shares its weight"
        )
    if any(getattr(new, key) and getattr(new, key) is not getattr(old, key) for key in _HOOKS):
        raise ValueError(
            f"module must have no hooks of its own, got {type(new).__name__} with some"
        )
    if isinstance(new, HasPackedWeight) and "weight" in old._parameters:
        new.set_weight_dtype(old._parameters["weight"].dtype)  # type: ignore[union-attr]
    new.train(old.training)
    for key in _HOOKS:
        object.__setattr__(new, key, getattr(old, key))
    object.__setattr__(new, "_is_full_backward_hook", old._is_full_backward_hook)
    point_hooks_at(new)
    for group, values in members.items():
        getattr(new, group).update(values)
    new._non_persistent_buffers_set.update(
        old._non_persistent_buffers_set & members["_buffers"].keys()
    )
    for key, value in attributes.items():
        if key not in vars(new) and (key in extra or not hasattr(new, key)):
            vars(new)[key] = value
    if "_hf_hook" in vars(old):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, vars(old)["_hf_hook"])


def _has_other(module: nn.Module, key: str, value: object) -> bool:
    """Whether a module has something else than `value` under a name, set or by its class."""
    for members in (vars(module), *(getattr(module, group) for group in _MEMBERS)):
        if key in members:
            return not _same(members[key], value)
    return hasattr(type(module), key)


def _same(a: object, b: object) -> bool:
    """Whether two values are one object, or plain and equal: Python makes a large number anew."""
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)


def _constants(module: nn.Module) -> set[str]:
    """The attributes that belong to a class by torch's convention."""
    return {name for kind in type(module).__mro__ for name in vars(kind).get("__constants__", ())}


def _patched(module: nn.Module) -> Iterator[str]:
    """Methods that an instance has in place of its class's."""
    own, kind = vars(module), type(module)
    for key, value in own.items():
        if key == "forward" and "_hf_hook" in own:
            value = own.get("_old_forward")
        method = getattr(kind, key, None)
        if callable(method) and not (
            getattr(value, "__func__", None) is method and value.__self__ is module
        ):
            yield key


def _attached(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What moves to another module: hooks and attributes."""
    for key in _HOOKS:
        for hook in getattr(module, key).values():
            yield f"hook in {key}", getattr(hook, "hook", hook)
    for key, value in vars(module).items():
        if key not in _OF_TORCH:
            yield f"attribute {key}", value


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hooks = [vars(module).get("_hf_hook")]
    while hooks:
        hook = hooks.pop()
        yield hook
        hooks += getattr(hook, "hooks", ())
