"""Adapters of PEFT on packed linears: LoRA, DoRA and "all-linear".

PEFT has no registry, so `import lowbit` adds these to its LoRA when that is imported; nothing is to be registered, and
an adapter loads as one of a dense model.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import layer, model
from torch import nn

from lowbit.integrations.dense import dense_of
from lowbit.nn import QuantExperts, QuantLinear


class MergesDense:
    """What layers of PEFT on a `QuantLinear` share.

    Merging makes the layer dense, which holds the sum exactly; `lowbit.quantize_model` packs it
    again. Unmerging gives the packed layer back, bit for bit.
    """

    get_base_layer: Any

    def _as_layer(self) -> Any:
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # PEFT warns of every layer that it does not know, and takes its features all the same.
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to a dense copy of the weight, which takes the place of the packed layer."""
        this, base = self._as_layer(), self.get_base_layer()
        if tuners_utils.check_adapters_to_merge(this, adapter_names) and isinstance(
            base, QuantLinear
        ):
            self._packed = (base,)  # a tuple: no child
            dense: Any = dense_of(base)
            dense.requires_grad_(False)
            if dense.bias is not None:
                dense.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
            self.base_layer = dense
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Puts the packed layer back."""
        super().unmerge()  # type: ignore[misc]
        if packed := self.__dict__.pop("_packed", None):
            (self.base_layer,) = packed


class QuantLoraLinear(MergesDense, layer.Linear):  # type: ignore[misc]
    """LoRA, or DoRA, on a `QuantLinear`; only the adapter is trained."""


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    wrapped = isinstance(target, tuners_utils.BaseTunerLayer)
    base: Any = target.get_base_layer() if wrapped else target  # type: ignore[operator]
    if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
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


def keep_experts(conversion: Any) -> None:
    """Lets a module of PEFT that turns names of experts into those of parameters leave models alone whose experts are
    layers; it would read a pattern as the last components alone.
    """
    convert = conversion._convert_peft_config_moe

    def convert_dense(config: Any, module: nn.Module) -> None:
        if not any(isinstance(child, QuantExperts) for child in module.modules()):
            convert(config, module)

    conversion._convert_peft_config_moe = convert_dense


_lora: Any = model
_tuners: Any = tuners_utils
_default, _dense_linear = _lora.dispatch_default, _tuners._maybe_include_all_linear_layers
_lora.dispatch_default, _tuners._maybe_include_all_linear_layers = _dispatch, _all_linear
