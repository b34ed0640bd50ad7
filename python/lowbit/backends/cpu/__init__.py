"""The CPU: the layouts "n16" and "rows" and the compiled kernels of `lowbit._C`."""

from lowbit.backends.cpu.backend import CPU, CpuBackend
from lowbit.backends.cpu.structured import STRUCTURED, StructuredBackend

__all__ = ["CPU", "STRUCTURED", "CpuBackend", "StructuredBackend"]
