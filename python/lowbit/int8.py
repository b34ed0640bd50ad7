"""int8 activations (`ops/int8.py`): `quantize`, `linear`, `static_linear`, and requantization in integers."""

from lowbit.ops.int8 import dyadic, linear, quantize, requantize, static_linear

__all__ = ["dyadic", "linear", "quantize", "requantize", "static_linear"]
