"""Quantization methods: each makes a QuantTensor from a weight matrix, a file each; they know no modules."""

from lowbit.methods.registry import METHODS, quantize

__all__ = ["METHODS", "quantize"]
