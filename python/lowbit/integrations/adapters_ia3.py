"""(IA)^3 of PEFT on packed linears; `import lowbit` adds this to PEFT when that is imported."""

from __future__ import annotations

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.ia3 import layer, model
from torch import nn

from lowbit.integrations.adapters_shared import MergesDense
from lowbit.integrations.dense import dense_of
from lowbit.nn import QuantLinear


class QuantIA3Linear(MergesDense, layer.Linear):  # type: ignore[misc]
    """(IA)^3 on a `QuantLinear`; only the factors are trained."""

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        # PEFT takes the shape, and the device of the factors, from a dense layer alone.
        wrapped = isinstance(base_layer, tuners_utils.BaseTunerLayer)
        packed: Any = base_layer.get_base_layer() if wrapped else base_layer
        super().__init__(dense_of(packed), adapter_name, **kwargs)
        self.base_layer = base_layer


def _create(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    wrapped = isinstance(target, tuners_utils.BaseTunerLayer)
    base: Any = target.get_base_layer() if wrapped else target  # type: ignore[operator]
    if not isinstance(base, QuantLinear):
        return _default(config, adapter_name, target, **kwargs)
    feedforward = kwargs.get("is_feedforward", False)
    return QuantIA3Linear(target, adapter_name, config=config, is_feedforward=feedforward)


_ia3: Any = model.IA3Model
_default = _ia3._create_new_module
_ia3._create_new_module = staticmethod(_create)
