"""Tensors that end at a page which nobody may touch: reading or writing beyond them stops the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

from lowbit.layouts import KernelWeight, Operands
from lowbit.weights.quantized import QuantTensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_OPERANDS = ("codes", "scales", "zeros", "table", "outlier_columns", "outlier_values")


class Guard:
    """Makes copies and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def tensor(self, t: Tensor) -> Tensor:
        """A contiguous copy of t whose last byte is the last one that may be read; 0xFF lies before the first."""
        size = t.numel() * t.element_size()
        if size == 0:
            return t
        usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
        end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + usable
        assert _LIBC.mprotect(end, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
        memory[: usable - size] = b"\xff" * (usable - size)
        made = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=usable - size)
        self.count += 1
        return made.view(t.dtype).view(t.shape).copy_(t.detach())

    def rows(self, t: Tensor, gap: int) -> Tensor:
        """The same, with `gap` elements of 0xFF between its rows."""
        wide = torch.empty((*t.shape[:-1], t.shape[-1] + gap), dtype=t.dtype)
        wide.view(torch.uint8).fill_(0xFF)
        wide[..., gap:] = t
        return self.tensor(wide)[..., gap:]

    def all(self, value: Any) -> Any:
        """Copies of the tensors of an argument: a tensor, a weight, or a sequence of them."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, KernelWeight):
            return value.map(self.tensor)
        if isinstance(value, Operands):
            return Operands(*map(self.all, value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.all(v) for v in value)
        if isinstance(value, QuantTensor):
            tensors = {name: self.all(t) for name, t in value.tensors.items()}
            return QuantTensor(value.format, value.shape, tensors)
        return value
