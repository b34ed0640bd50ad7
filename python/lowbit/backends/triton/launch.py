"""What every launch of Triton kernels needs: the package of kernels, the device, dtypes under the interpreter.

Kernels run on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before the first import).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from lowbit.strides import contiguous


@functools.cache
def kernels() -> ModuleType:
    """The package of kernels, imported when it is first needed.

    Raises:
        ImportError: triton is not installed.
    """
    return importlib.import_module("lowbit.triton_kernels")


def interpreted(device: torch.device) -> bool:
    """Whether Triton's interpreter runs the kernels. It cuts bf16 off, so it reads and stores fp32."""
    return device.type == "cpu"


def stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What kernels store where a result of `dtype` is wanted."""
    return torch.float32 if interpreted(device) else dtype


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def add_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (M, N) = the sum of parts (splits, M, N) in fp32, in order, + bias (N,)."""
    splits, m, n = parts.shape
    block = 256
    with on_device(parts.device):
        kernels().linear.add_splits_kernel[(-(-m * n // block),)](
            parts,
            parts if bias is None else contiguous(bias),
            out,
            m * n,
            n,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            enable_fp_fusion=False,
        )
