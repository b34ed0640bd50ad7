"""What a lower layer calls of a higher one. `lowbit/__init__.py`, which runs before every module and knows
them all, fills it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

dequantize: Callable[..., Any]  # (QuantTensor, torch.dtype) -> Tensor: `lowbit.ops.dequantize`
