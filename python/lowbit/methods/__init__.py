"""Quantization methods: each makes a QuantTensor from a weight matrix, a file each; they know no modules.

`lowbit.methods()` says what there is: the package itself can be called.
"""

import sys
from types import ModuleType

from lowbit.methods.registry import METHODS, MethodInfo, describe, quantize

__all__ = ["METHODS", "MethodInfo", "describe", "quantize"]


class _Methods(ModuleType):
    def __call__(self) -> dict[str, MethodInfo]:
        """As `describe`."""
        return describe()


sys.modules[__name__].__class__ = _Methods
