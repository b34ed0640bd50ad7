"""Adapters of PEFT on packed linears: LoRA, DoRA and "all-linear".

PEFT has no registry, so `import lowbit` adds these to its LoRA when that is imported; nothing is to be registered, and
an adapter loads as one of a dense model.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import layer, model
from torch import nn

from lowbit.integrations.adapters_shared import MergesDense
from lowbit.nn import QuantLinear


class QuantLoraLinear(MergesDense, layer.Linear):  # type: ignore[misc]
    """LoRA, or DoRA, on a `QuantLinear`; only the adapter is trained."""


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    wrapped = isinstance(target, tuners_utils.BaseTunerLayer)
    base: Any = target.get_base_layer() if wrapped else target  # type: ignore[operator]
    if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
        if base.split is not None:
            raise NotImplementedError(
                f"adapters multiply whole weights, and that of a {type(base).__name__} is not in one process: "
                f"{base.split}"
            )
        kwargs.pop("parameter_name", None)
        return QuantLoraLinear(target, adapter_name, config=config, **kwargs)
    return _default(target, adapter_name, config=config, **kwargs)


def _all_linear(config: Any, module: nn.Module) -> Any:
    targets = getattr(config, "target_modules", None)
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    made: Any = _dense_linear(config, module)
    if every:
        get_head: Any = getattr(module, "get_output_embeddings", None)
        head = None if get_head is None else get_head()
        made.target_modules = {
            *made.target_modules,
            *(n for n, m in module.named_modules() if isinstance(m, QuantLinear) and m is not head),
        }
    return made


_lora: Any = model
_tuners: Any = tuners_utils
_default, _dense_linear = _lora.dispatch_default, _tuners._maybe_include_all_linear_layers
_lora.dispatch_default, _tuners._maybe_include_all_linear_layers = _dispatch, _all_linear
