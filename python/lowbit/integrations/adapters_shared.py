"""What adapters of PEFT on packed linears share. PEFT is not imported here: it would import them, which import this."""

from __future__ import annotations

import warnings
from typing import Any

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
        from peft.tuners import tuners_utils

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


def keep_experts(conversion: Any) -> None:
    """Lets a module of PEFT that turns names of experts into those of parameters leave models alone whose experts are
    layers; it would read a pattern as the last components alone.
    """
    convert = conversion._convert_peft_config_moe

    def convert_dense(config: Any, module: nn.Module) -> None:
        if not any(isinstance(child, QuantExperts) for child in module.modules()):
            convert(config, module)

    conversion._convert_peft_config_moe = convert_dense
