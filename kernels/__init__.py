"""Triton kernels over packed weights, as `lowbit.layouts.k16` describes them; they import nothing of lowbit."""

import torch
import triton.language as tl

from . import codecs, configs, dequantize, fp8_adamw, fp8_matmul, fp8_quantize, linear

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's name of each dtype of activations."""

__all__ = [
    "TYPES",
    "codecs",
    "configs",
    "dequantize",
    "fp8_adamw",
    "fp8_matmul",
    "fp8_quantize",
    "linear",
]
