"""Binary activations for binary weights (`ops/binary.py`)."""

from lowbit.ops.binary import linear, quantize

__all__ = ["linear", "quantize"]
