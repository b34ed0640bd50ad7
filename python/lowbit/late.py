"""What a lower layer calls of a higher one. `lowbit/__init__.py`, which runs before every module and knows
them all, fills it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

dequantize: Callable[..., Any]  # (QuantTensor, torch.dtype) -> Tensor: `lowbit.dequantize`
usable_threads: Callable[[int], int]  # of so many that are wanted; 1 in the child of a fork
prepack: Callable[..., Any]  # canonical codes to those of the layout n16, as numpy arrays, and back
unprepack: Callable[..., Any]
quantized: Callable[[Any], object]  # what shall follow when a model has been quantized
