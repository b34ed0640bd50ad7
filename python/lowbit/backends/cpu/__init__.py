"""The CPU: the layout "n16" and the compiled kernels of `lowbit._C`."""

from lowbit.backends.cpu.backend import CPU, CpuBackend

__all__ = ["CPU", "CpuBackend"]
