"""What every launch of a Triton kernel needs: the package of kernels, the device, and what the interpreter reads and
stores.
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

# Programs of the interpreter run one after another: as many as one multiprocessor would hold.
_INTERPRETED_SMS = 1


@functools.cache
def kernels() -> ModuleType:
    """The package of kernels, imported when it is first needed.

    Raises:
        ImportError: triton is not installed.
    """
    return importlib.import_module("lowbit.triton_kernels")


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def interpreted(device: torch.device) -> bool:
    """Whether Triton's interpreter runs the kernels. It cuts bf16 off, so it reads and stores fp32."""
    return device.type == "cpu"


def readable(x: Tensor) -> Tensor:
    """x in fp32, bf16 or fp16 as a kernel reads it."""
    return x.float() if interpreted(x.device) else x


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a kernel stores where a result in fp32, bf16 or fp16 is wanted; `.to(dtype)` makes that of it."""
    return torch.empty(shape, dtype=torch.float32 if interpreted(device) else dtype, device=device)


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
